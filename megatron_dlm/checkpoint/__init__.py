"""Checkpoints: distributed ones for training, and those of other libraries."""
