"""Where checkpoints come from, where they go, and what of them is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LoadConfig:
    """Where the weights come from."""

    load: str | None = None
    """Folder to read a checkpoint from. What is not said about model and tokenizer is taken from it too."""
    hf_checkpoint: str | None = None
    """Folder of a HuggingFace checkpoint to take model, weights and tokenizer from, instead of --load."""
    ckpt_step: int | None = None
    """Read the checkpoint of this iteration instead of the newest."""


@dataclass(slots=True)
class CheckpointConfig(LoadConfig):
    """Where checkpoints go and come from."""

    save: str | None = None
    """Folder to write checkpoints to, and what is left of the run to look at: its settings (config.yaml), metrics
    (metrics.jsonl), a picture of them (curves.png), and in RL some responses (samples.jsonl)."""
    save_interval: int | None = None
    """Write a checkpoint every so many optimizer steps (RL steps in RL); only at the end when it is not given."""
    keep_last_n: int | None = None
    """Keep only this many of the newest checkpoints of --save; all of them when it is not given."""
    finetune: bool = False
    """Load the weights only: start at iteration 0 with a fresh optimizer. Needed between stages, from sft to
    tracerl."""
    mask_embedding_init: str | None = None
    """What the embedding of the mask token begins as, at a fresh start from --hf-checkpoint or --load: 'keep' (the row
    that is there), 'mean' of the trained rows, 'normal' (a draw from their distribution), or a token of the tokenizer,
    whose row is copied. When it is not given: keep where the weights have learned the mask, else mean."""
    no_load_optim: bool = False
    """Leave the checkpoint's optimizer state unread."""
    no_save_optim: bool = False
    """Leave the optimizer state out of written checkpoints."""
