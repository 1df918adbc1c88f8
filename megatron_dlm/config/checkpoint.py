"""Where checkpoints go, where they come from, and what of them is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    save: str | None = None
    """Folder to write checkpoints to."""
    load: str | None = None
    """Folder to read a checkpoint from."""
    save_interval: int | None = None
    """Write a checkpoint every so many optimizer steps (RL steps in RL); only at the end when it is not given."""
    finetune: bool = False
    """Load the weights only: start at iteration 0 with a fresh optimizer."""
    no_load_optim: bool = False
    """Leave the checkpoint's optimizer state unread."""
    no_save_optim: bool = False
    """Leave the optimizer state out of written checkpoints."""
