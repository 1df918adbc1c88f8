"""Evaluation during and after training: on which prompts, how often, and with which sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class EvalConfig:
    """Evaluation: on which prompts, and with which sampling."""

    eval_prompt_data: list[str] | None = None
    """Prompt sources to evaluate on: JSONL files, or reasoning_gym:NAME."""
    eval_num_prompts: int | None = None
    """Evaluate on the first so many prompts; all of them when it is not given."""
    n_samples_per_eval_prompt: int = 1
    """Responses per prompt."""
    eval_temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    eval_top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all of them."""
    eval_top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    eval_max_response_len: int | None = None
    """Longest response in tokens; that of the rollout when it is not given."""
    eval_remasking: list[Literal["static", "dynamic", "sequential", "entropy_bounded"]] = field(
        default_factory=lambda: ["dynamic"]
    )
    """Ways of unmasking to evaluate, each on its own (see --remasking)."""
    eval_threshold: float = 0.9
    """Confidence above which dynamic remasking unmasks a token."""
    eval_confidence: Literal["sampled", "untempered", "margin", "entropy"] = "sampled"
    """What makes a token sure: its probability when it was drawn, that without temperature and filters, the lead of the
    likeliest token, or a low entropy, which is what entropy-bounded remasking always goes by."""
    eval_entropy_bound: float = 0.35
    """Entropy, in nats, below which the tokens that entropy-bounded remasking unmasks together must stay in sum."""
    eval_block_size: list[int] | None = None
    """Blocks in which responses are generated, each evaluated on its own; that of the rollout when they are not given.
    Where several are given, the names of metrics end in the block: eval/dynamic-block8/accuracy."""
    eval_denoising_steps: int | None = None
    """Denoising steps per block; the block size when it is not given."""
    save_eval_samples: str | None = None
    """File to which every evaluated response is appended as a JSON line, to look at the wrong ones."""


@dataclass(slots=True)
class TrainingEvalConfig(EvalConfig):
    """Evaluation during training."""

    eval_interval: int | None = None
    """Evaluate every so many training steps; never during training when it is not given."""
