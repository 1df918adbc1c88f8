"""Weights that have not learned the mask token: an autoregressive model on its way to block diffusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron_dlm.commands.weights import TOKENIZER
from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig


def check_mask_init(checkpoint: CheckpointConfig) -> None:
    """Refuse a start for the mask of weights that are not loaded."""
    if checkpoint.mask_embedding_init is not None and checkpoint.load is None and checkpoint.hf_checkpoint is None:
        raise ConfigError(
            f"--mask-embedding-init {checkpoint.mask_embedding_init} is for weights that are loaded, and all of these "
            "are drawn. Leave it out, or give --hf-checkpoint or --load."
        )


def introduce_mask(state, checkpoint: CheckpointConfig, session, seed: int, say: Callable[[str], None]) -> None:
    """Give the mask's embedding its start (--mask-embedding-init), and say which, where a run starts from weights of
    another one. Collective; after `restore` and `check_mask_token`.
    """
    from megatron_dlm.checkpoint.mask_embedding import KEEP, MEAN, NORMAL, set_row

    if checkpoint.hf_checkpoint is None and not (checkpoint.load is not None and checkpoint.finetune):
        return  # no weights, or those of the run itself, which has learned the mask since
    words, how = session.tokenizer, checkpoint.mask_embedding_init
    stored, mask_id = _known(checkpoint)
    if how is None:
        learned = stored is None or (mask_id in (None, words.mask_id) and not stored.is_autoregressive)
        how = KEEP if learned or session.model.is_autoregressive else MEAN
    if how == KEEP:
        return
    wanted = how if how in (MEAN, NORMAL) else words.encode(how)[0]
    trained = min(words.vocab_size, session.model.vocab_size if stored is None else stored.vocab_size)
    set_row(state, words.mask_id, trained, wanted, seed)
    start = {MEAN: "the mean of the others", NORMAL: "a draw from the distribution of the others"}
    say(
        f"The embedding of the mask token {words.mask_id} begins as {start.get(how, f'that of the token {how}')} "
        "(--mask-embedding-init)"
    )


def _known(checkpoint: CheckpointConfig) -> tuple[ModelConfig | None, int | None]:
    """The resolved model whose weights are loaded, if that is known, and the id of its mask token."""
    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.data.tokenizer import Tokenizer
    from megatron_dlm.model.shape import resolve

    if checkpoint.hf_checkpoint is not None:
        source = HFSource.open(checkpoint.hf_checkpoint)
        return resolve(ModelConfig(**source.fields), None), source.mask_id
    folder = places.find(checkpoint.load, checkpoint.ckpt_step)
    stored: dict[str, Any] | None = distributed.read_extra(folder).get("model")
    mask_id = Tokenizer(folder / TOKENIZER).mask_id if (folder / TOKENIZER).is_dir() else None
    if stored is None:
        return None, mask_id
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in stored.items() if name in fields}), mask_id


def check_mask_token(checkpoint: CheckpointConfig, words) -> None:
    """Refuse a start that is none of the known ones and no single token either, before any weight is read.

    Args:
        words: the tokenizer of the run.

    Raises:
        ConfigError: it is not.
    """
    how = checkpoint.mask_embedding_init
    if how in (None, "keep", "mean", "normal"):
        return
    ids = words.encode(how)
    if ids == [words.mask_id]:
        raise ConfigError(
            f"--mask-embedding-init {how} is the mask token itself. Give another one, or keep, mean or normal."
        )
    if len(ids) != 1:
        raise ConfigError(
            f"--mask-embedding-init {how} is {len(ids)} tokens of this tokenizer. Give a single one, or keep, mean or "
            "normal."
        )
