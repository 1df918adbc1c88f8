"""Tests of verdicts and of the processes that give them."""
