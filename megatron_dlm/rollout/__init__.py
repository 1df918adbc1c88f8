"""Rollout: an engine for block diffusion inside the training processes, its KV cache, and its weights' way there."""
