"""How responses are generated: how many, how long, and in which order their tokens are unmasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class EngineConfig:
    """What every generation needs: the room for texts, and the block in which they grow."""

    rollout_max_prompt_len: int = 1024
    """Longest prompt, in tokens."""
    rollout_max_response_len: int = 256
    """Longest response, in tokens."""
    rollout_block_size: int | None = None
    """Block in which tokens are generated; the attention block size when it is not given."""
    max_running_requests: int = 256
    """Responses that one engine works on at the same time."""
    max_tokens_per_pass: int = 8192
    """Most tokens in one pass of the engine; when its responses need more, they take turns."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a response; the tokenizer's end token when they are not given."""


@dataclass(slots=True)
class RolloutConfig(EngineConfig):
    """How responses are generated in training."""

    rollout_batch_size: int = 64
    """Prompts per RL step."""
    n_samples_per_prompt: int = 16
    """Responses per prompt."""
    rollout_temperature: float = 1.0
    """Sampling temperature, above 0."""
    rollout_top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all of them."""
    rollout_top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    remasking: Literal["static", "dynamic", "sequential"] = "dynamic"
    """Tokens that a denoising step unmasks: the surest at a fixed rate, all above the threshold, or left to right."""
    denoising_steps: int | None = None
    """Denoising steps per block; the block size (one token per step) when it is not given."""
    threshold: float = 0.9
    """Confidence above which dynamic remasking unmasks a token."""
