"""TraceRL: trajectory-aware reinforcement learning for diffusion language models (arXiv 2509.06949)."""
