"""What supervised fine-tuning learns from a text: what is hidden of it, and what its tokens weigh."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar


@dataclass(slots=True)
class SFTObjectiveConfig:
    """The objective of supervised fine-tuning. None stands for what --sft-objective decides."""

    sft_objective: Literal["elbo", "semi_ar", "random_masking", "trace", "ar"] = "elbo"
    """What is learned: 'elbo', a bound on the likelihood, of each block by itself; 'semi_ar', each block (under full
    attention each slice of --slice-size) behind finished text, all hidden tokens alike; 'random_masking', one noise
    level for the whole response; 'trace', the steps of the data's step maps; 'ar', the next token."""
    mask_ratio_per: Literal["block", "sample", "token"] | None = None
    """Draw the noise level once per block, once per sample, or for each token."""
    min_mask_ratio: float | None = None
    """Lowest noise level that is drawn."""
    max_mask_ratio: float | None = None
    """Highest noise level that is drawn."""
    max_loss_weight: float | None = None
    """Largest weight of a masked token; the weight is 1 / noise level up to here."""
    mask_draws: int = 1
    """Masks of each sample in an update; what they ask for is averaged."""
    complementary_masks: bool = False
    """Draw masks in pairs: what one hides, the other shows, so that a pair predicts each token once."""
    mask_at_least_one: bool = False
    """Hide a token of each block for which the draw hides none."""
    mask_ratio_warmup_iters: int = 0
    """Optimizer steps over which the highest noise level rises from the lowest; in them all weights are 1."""
    slice_size: int = 16
    """Tokens of a slice, for semi_ar under full attention."""
    shrinkage: int = 1
    """Number of neighbouring denoising steps of a trace that are learned as one."""
    redraw_masks: bool = True
    """Draw the masks of a sample anew each time it comes; otherwise it has the same masks in every epoch, as in the
    published code of TraceRL."""
    loss_on_pad: bool = True
    """Train on the pad tokens that fill the last block of a response."""
    noise_prompt: bool = False
    """Learn the prompt like the response, as in continued pre-training."""
    canvas_length: int | None = None
    """Under full attention: tokens that a response is written on. The masks behind it are shown in every noisy copy, as
    generation shows them (--rollout-max-response-len there); without it a text ends with its response."""
    ar_loss_coef: float = 0.0
    """Weight of a loss of next-token prediction beside the objective, on a copy of the text that is read causally."""
    confidence_coef: float = 0.0
    """Weight of the entropy of the model's prediction at the hidden tokens that it predicts right."""
    block_size_schedule: list[str] | None = None
    """Block sizes to train in, each with its number of steps, as in '1:200 4:200 32': the last has no number, and is
    the model's block size. 'full' is one block for everything."""


OBJECTIVES: dict[str, dict[str, Any]] = {
    "elbo": dict(mask_ratio_per="block", min_mask_ratio=1e-3, max_mask_ratio=1.0, max_loss_weight=10.0),
    "semi_ar": dict(mask_ratio_per="token", min_mask_ratio=0.1, max_mask_ratio=0.9, max_loss_weight=1.0),
    "random_masking": dict(mask_ratio_per="sample", min_mask_ratio=0.1, max_mask_ratio=0.9, max_loss_weight=1.0),
    "trace": {},
    "ar": {},
}
"""What each objective sets where the user does not. Sources: sft/objectives.py."""


def num_masks(config: SFTObjectiveConfig) -> int:
    """Masks of each sample in an update, over which is averaged."""
    return config.mask_draws * (2 if config.complementary_masks else 1)


MASKED = tuple(name for name, settings in OBJECTIVES.items() if settings)
"""The objectives that draw masks."""

Config = TypeVar("Config", bound=SFTObjectiveConfig)


def with_objective(config: Config) -> Config:
    """The same settings with every field filled that the objective decides on and the user did not."""
    wanted = OBJECTIVES[config.sft_objective]
    found = {name: value for name, value in wanted.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **found)
