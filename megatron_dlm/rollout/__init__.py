"""Rollout: an engine for block diffusion inside the training processes, its block KV cache, and the refit that carries weights to it."""
