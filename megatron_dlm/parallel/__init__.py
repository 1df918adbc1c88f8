"""Process groups, and what moves between their ranks. The only folder that talks to megatron-core's parallel_state."""
