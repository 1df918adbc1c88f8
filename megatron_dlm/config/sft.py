"""Supervised fine-tuning: its data, the size of its steps, and the noise of its objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.sft_objective import SFTObjectiveConfig


@dataclass(slots=True)
class SFTConfig(SFTObjectiveConfig):
    """Supervised fine-tuning."""

    data_path: list[str] = field(default_factory=list)
    """Training data: JSONL files, and prefixes of what preprocess wrote (PREFIX.bin, .idx and .json), mixed at will."""
    data_weights: list[float] = field(default_factory=list)
    """Shares of the sources of --data-path among the samples of a run, in the same order: 2 1 takes two samples of the
    first for each of the second. Each source then goes through epochs of its own. Without weights all samples are one
    pool, and a source has the share of its size."""
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
    num_workers: int | None = None
    """Processes beside each training process that prepare its rows ahead, 1 or 0; when it is not given, 1 on a GPU or
    with DALI, and 0 on a CPU."""
    dataloader_type: Literal["default", "dali"] = "default"
    """Who hands rows to the device: our own loader, or NVIDIA DALI. Both hand over the same ones."""
