"""Generation to a file: for which prompts, and with which sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class GenerateConfig:
    """Generation to a file."""

    prompts: str | None = None
    """JSONL file with one prompt per line, as question, prompt, messages or prompt_token_ids."""
    output: str | None = None
    """JSONL file to write: one response per line with its token ids, step map and log-probabilities."""
    num_samples: int = 1
    """Responses per prompt."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all of them."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    remasking: Literal["static", "dynamic", "sequential"] = "dynamic"
    """Tokens that a denoising step unmasks: the surest at a fixed rate, all above the threshold, or left to right."""
    denoising_steps: int | None = None
    """Denoising steps per block; the block size (one token per step) when it is not given."""
    threshold: float = 0.9
    """Confidence above which dynamic remasking unmasks a token."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a response; the tokenizer's end token when they are not given."""
    ignore_eos: bool = False
    """Do not end a response before its longest length."""
    max_running_requests: int = 256
    """Responses that one engine works on at the same time."""
    max_tokens_per_pass: int = 8192
    """Most tokens in one pass of the engine; when its responses need more, they take turns."""
