"""Generation to a file: for which prompts, and with which sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.config.rollout import CapacityConfig


@dataclass(slots=True)
class GenerateConfig(CapacityConfig):
    """Generation to a file."""

    prompts: str | None = None
    """JSONL file with one prompt per line, as question, prompt, messages or prompt_token_ids; a line's sampling, an
    object such as {"temperature": 0.5}, beats the settings below."""
    output: str | None = None
    """JSONL file to write: one response per line with its token ids, step map and log-probabilities."""
    num_samples: int = 1
    """Responses per prompt."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""
    rollout_block_size: int | None = None
    """Block in which tokens are generated; the attention block size when it is not given."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all of them."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    remasking: Literal["static", "dynamic", "sequential", "entropy_bounded"] = "dynamic"
    """Tokens that a denoising step unmasks: the surest at a fixed rate, all above the threshold, left to right, or as
    many of the least uncertain as the entropy bound allows."""
    denoising_steps: int | None = None
    """Denoising steps per block; the block size (one token per step) when it is not given."""
    threshold: float = 0.9
    """Confidence above which dynamic remasking unmasks a token."""
    confidence: Literal["sampled", "untempered", "margin", "entropy"] = "sampled"
    """What makes a token sure: its probability when it was drawn, that without temperature and filters, the lead of the
    likeliest token, or a low entropy, which is what entropy-bounded remasking always goes by."""
    entropy_bound: float = 0.35
    """Entropy, in nats, below which the tokens that entropy-bounded remasking unmasks together must stay in sum."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a response; the tokenizer's end token when they are not given."""
    ignore_eos: bool = False
    """Do not end a response before its longest length."""
    prefix_cache: bool = True
    """Under full attention, read the text before a block once per block, not at each of its steps."""
    horizon: int | None = None
    """Under full attention, how many positions after the block a model sees as masks; all that are left when it is not
    given."""
