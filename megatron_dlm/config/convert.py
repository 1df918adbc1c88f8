"""Conversion between HuggingFace checkpoints and distributed ones, and of adapters into weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ImportConfig:
    """From a HuggingFace checkpoint to a distributed one."""

    hf_checkpoint: str | None = None
    """Folder of the HuggingFace checkpoint."""
    save: str | None = None
    """Folder to write to; the checkpoint becomes its iteration 0."""


@dataclass(slots=True)
class ExportConfig:
    """From a distributed checkpoint to a HuggingFace one."""

    load: str | None = None
    """Folder that a run wrote with --save."""
    ckpt_step: int | None = None
    """Iteration to export instead of the newest."""
    save: str | None = None
    """Folder to write; it must not exist, or be empty."""
    hf_family: str | None = None
    """Kind of checkpoint to write (sdar, sdar-moe, qwen3, qwen3-moe, llada, dream or llada2); that which the model came
    from, else sdar, when it is not given."""
    export_dtype: str | None = None
    """Type of the weights (bfloat16, float16 or float32); that of the checkpoint that the model came from, else of this
    one, when it is not given."""
    max_shard_gb: float = 5.0
    """Largest file, in gigabytes."""


@dataclass(slots=True)
class MergeConfig:
    """From a distributed checkpoint with low-rank adapters to one without, which computes the same."""

    load: str | None = None
    """Folder that a run with --lora-rank wrote with --save."""
    ckpt_step: int | None = None
    """Iteration to merge instead of the newest."""
    save: str | None = None
    """Folder to write to; the checkpoint becomes its iteration 0."""


@dataclass(slots=True)
class VerifyConfig:
    """Compare a HuggingFace checkpoint with a distributed one, weight by weight."""

    hf_checkpoint: str | None = None
    """Folder of the HuggingFace checkpoint."""
    load: str | None = None
    """Folder that a run wrote with --save."""
    ckpt_step: int | None = None
    """Iteration to compare instead of the newest."""
