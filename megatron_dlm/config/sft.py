"""Supervised fine-tuning: its data, the size of its steps, and the noise of its objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class SFTConfig:
    """Supervised fine-tuning."""

    data_path: list[str] = field(default_factory=list)
    """Training files, JSONL."""
    train_iters: int = 1000
    """Number of optimizer steps."""
    global_batch_size: int = 128
    """Samples per optimizer step, over all processes."""
    max_tokens_per_row: int = 4096
    """Token budget of a packed row, noisy copies included; under context parallelism of the whole row, of which
    each process holds a part."""
    seq_length: int | None = None
    """Longest sample in tokens, prompt and response together; longer ones are left out and counted. The model's
    positions when it is not given."""
    mask_ratio_per: Literal["block", "sample", "token"] = "block"
    """Draw the noise level once per block, once per sample, or for each token."""
    min_mask_ratio: float = 1e-3
    """Lowest noise level that is drawn."""
    max_mask_ratio: float = 1.0
    """Highest noise level that is drawn."""
    redraw_masks: bool = True
    """Draw the masks of a sample anew each time it comes; otherwise it has the same masks in every epoch, as in the
    published code of TraceRL."""
    max_loss_weight: float = 10.0
    """Largest weight of a masked token; the weight is 1 / noise level up to here."""
    loss_on_pad: bool = True
    """Train on the pad tokens that fill the last block of a response."""
