"""Verdicts on responses, computed in worker processes."""
