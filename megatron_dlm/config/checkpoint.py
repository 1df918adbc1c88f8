"""Where checkpoints come from, where they go, and what of them is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LoadConfig:
    """Where the weights come from."""

    load: str | None = None
    """Folder to read a checkpoint from."""


@dataclass(slots=True)
class CheckpointConfig(LoadConfig):
    """Where checkpoints go and come from."""

    save: str | None = None
    """Folder to write checkpoints to, and the settings of the run (config.yaml)."""
    save_interval: int | None = None
    """Write a checkpoint every so many optimizer steps (RL steps in RL); only at the end when it is not given."""
    finetune: bool = False
    """Load the weights only: start at iteration 0 with a fresh optimizer. Needed between stages, from sft to
    tracerl."""
    no_load_optim: bool = False
    """Leave the checkpoint's optimizer state unread."""
    no_save_optim: bool = False
    """Leave the optimizer state out of written checkpoints."""
