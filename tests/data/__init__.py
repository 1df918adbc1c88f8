"""Tests of what the trainers read."""
