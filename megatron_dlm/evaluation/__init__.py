"""Evaluation: generate, judge, report."""
