"""Tests of the tools, run as a user runs them."""
