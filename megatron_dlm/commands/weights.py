"""Where a command's weights come from, and where they go: the checkpoint of --load or --hf-checkpoint, and --save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dlm.config.checkpoint import CheckpointConfig, LoadConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import NOT_OF_THE_WEIGHTS, ModelConfig
from megatron_dlm.config.overrides import EITHER_WAY

TOKENIZER = "tokenizer"  # folder within a checkpoint
_NOT_TAKEN = (*NOT_OF_THE_WEIGHTS, "model_preset")  # what a preset stands for is stored


def complete(config: dict[str, Any]) -> None:
    """Take what the user did not say about model and tokenizer from the checkpoint, if there is one; of a run that is
    resumed also its adapters.

    A size that is given, by itself or through a preset, stays; whether it fits the weights is asked later (`restore`).

    Raises:
        ConfigError: both --load and --hf-checkpoint are given.
        CheckpointError: what is given is no readable checkpoint.
    """
    checkpoint, model, words = (config[name] for name in ("checkpoint", "model", "tokenizer"))
    if checkpoint.hf_checkpoint is not None:
        if checkpoint.load is not None:
            raise ConfigError("--load and --hf-checkpoint both name weights. Leave one of the two out.")
        _complete_from_hf(checkpoint.hf_checkpoint, model, words)
    elif checkpoint.load is not None:
        from megatron_dlm.checkpoint import distributed, places
        from megatron_dlm.checkpoint.adapters import LORA

        folder = places.find(checkpoint.load, checkpoint.ckpt_step)
        extra = distributed.read_extra(folder)
        stored = extra.get("model", {})
        if stored.get("num_experts") is None:
            stored.pop("moe_ffn_hidden_size", None)  # repeats the width of a dense model
        _fill(model, stored)
        if words.tokenizer_model is None and (folder / TOKENIZER).is_dir():
            words.tokenizer_model = str(folder / TOKENIZER)
        if "lora" in config and not (config["lora"].wanted or checkpoint.finetune) and LORA in extra:
            config["lora"] = LoraConfig.of(extra[LORA])  # a run that is resumed goes on with its adapters


def _complete_from_hf(folder: str, model: ModelConfig, words) -> None:
    from megatron_dlm.checkpoint.hf.source import HFSource

    source = HFSource.open(folder)
    _fill(model, source.fields)
    if words.tokenizer_model is None:
        words.tokenizer_model = folder
        if words.mask_token_id is None:
            words.mask_token_id = source.mask_id


def _fill(model: ModelConfig, known: dict[str, Any]) -> None:
    """Give the fields that are at their defaults what is known of them."""
    for field in dataclasses.fields(ModelConfig):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if field.name == "transformer_overrides":  # each of its keys is a setting
            stored = {name: value for name, value in known.get(field.name, {}).items() if name not in EITHER_WAY}
            model.transformer_overrides = {**stored, **model.transformer_overrides}
        if field.name not in known or field.name in _NOT_TAKEN or getattr(model, field.name) != default:
            continue
        if field.name == "block_size" and model.full_attention:
            continue
        if default is not None or model.model_preset is None:
            setattr(model, field.name, known[field.name])


def check_given(checkpoint: LoadConfig) -> None:
    """Refuse a command without weights.

    Raises:
        ConfigError: neither --load nor --hf-checkpoint is given.
    """
    if checkpoint.load is None and checkpoint.hf_checkpoint is None:
        raise ConfigError("--load is not set. Give the folder of the checkpoint to use, or --hf-checkpoint.")


def restore(
    state,
    checkpoint: LoadConfig,
    model: ModelConfig,
    stage: str | None,
    any_block_size: bool = False,
    flag: str | None = None,
) -> dict:
    """Load what --load or --hf-checkpoint names, if anything.

    Args:
        model: resolved; the one that wrote the checkpoint must be the same.
        stage: what is resumed; None where only the weights are wanted.
        any_block_size: whether the weights are used with the block size of this run, whatever theirs was.
        flag: that names the checkpoint where it is neither of the two.

    Returns:
        What was saved beside the weights; empty after a fresh start or with --finetune.
    """
    if checkpoint.hf_checkpoint is not None:
        from megatron_dlm.checkpoint import fit
        from megatron_dlm.checkpoint.hf.importer import load_into
        from megatron_dlm.checkpoint.hf.source import HFSource
        from megatron_dlm.model.shape import resolve

        named = flag or "--hf-checkpoint"
        source = HFSource.open(checkpoint.hf_checkpoint, named)
        stored = dataclasses.asdict(resolve(ModelConfig(**source.fields), None))
        # Blocks may be those of this run: that is how an autoregressive model becomes one of block diffusion.
        fit.check_same_model(
            {"model": stored | {"vocab_size": max(stored["vocab_size"], model.vocab_size)}},  # rows for new tokens
            model,
            f"{named} {checkpoint.hf_checkpoint}",
            finetune=True,
            converts=state.optimizer is not None,
        )
        load_into(state, source, model)
        return {}
    if checkpoint.load is None:
        return {}
    from megatron_dlm.checkpoint import distributed, fit

    finetune = isinstance(checkpoint, CheckpointConfig) and checkpoint.finetune
    flag = flag or "--load"
    source = f"{flag} {checkpoint.load}"

    def check(saved: dict[str, Any]) -> None:
        fit.check_kind(saved, False, source)
        if stage is not None and not finetune:
            fit.check_stage(saved, stage, checkpoint.load)
        fit.check_same_model(saved, model, source, finetune or any_block_size, converts=finetune)

    resume = state.optimizer is not None and not (finetune or checkpoint.no_load_optim)
    extra = distributed.load(state, checkpoint.load, checkpoint.ckpt_step, resume, check, flag)
    if finetune:
        state.iteration = 0
        return {}
    return extra


def checkpointer(
    session,
    state,
    checkpoint: CheckpointConfig,
    stage: str,
    progress: Callable[[], dict],
    say: Callable[[str], None],
    files: Callable[[], Callable[[Path], None] | None] = lambda: None,
    value_state=None,
) -> Callable[[int, bool], None]:
    """save(step, force): writes a checkpoint when --save-interval says so, always with `force`, never the same step
    twice; and deletes those that --keep-last-n leaves over.

    Stage and model are stored beside the weights, with what `progress` returns; so is the tokenizer, and what an export
    to HuggingFace needs of the checkpoint that the model came from.

    Args:
        files: called on all ranks when a checkpoint is written; what it returns, if anything, is called on rank 0 and
            writes more files into the checkpoint's folder.
        value_state: the TrainState of a value model, if there is one; its checkpoints come and go with the policy's
            (commands/value_weights.py).
    """
    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.commands import value_weights

    origin = _origin(checkpoint) if checkpoint.save is not None and session.groups.is_main else None
    written: list[int] = []

    def save(step: int, force: bool) -> None:
        due = force or (checkpoint.save_interval is not None and step % checkpoint.save_interval == 0)
        if checkpoint.save is None or not due or step in written:
            return
        extra = {"stage": stage, "model": dataclasses.asdict(session.model), **progress()}
        if origin is not None:
            extra["hf"] = origin.info
        write_more = files()
        if value_state is not None:
            extra |= value_weights.save(value_state, state, checkpoint, step, session.model)

        def add(folder: Path) -> None:
            add_files(folder, session.tokenizer, origin)
            if write_more is not None:
                write_more(folder)

        distributed.save(
            state,
            checkpoint.save,
            step,
            extra,
            with_optimizer=not checkpoint.no_save_optim,
            add_files=add,
        )
        written.append(step)
        say(f"Saved iteration {step} to {checkpoint.save}")
        if checkpoint.keep_last_n is not None and session.groups.is_main:
            places.keep_newest(checkpoint.save, step, checkpoint.keep_last_n)
            if value_state is not None:  # after the policy's: none of them is ever without its value model
                places.keep_newest(Path(checkpoint.save) / value_weights.FOLDER, step, checkpoint.keep_last_n)

    return save


def add_files(folder: Path, tokenizer, origin) -> None:
    """What lies in a checkpoint beside the weights. Args: origin: an `Origin`, or None."""
    tokenizer.save(folder / TOKENIZER)
    if origin is not None:
        origin.write(folder)


def _origin(checkpoint: LoadConfig):
    """The HuggingFace checkpoint that the weights once came from, read before anything of it is replaced."""
    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.checkpoint.hf.origin import Origin
    from megatron_dlm.checkpoint.hf.source import HFSource

    if checkpoint.hf_checkpoint is not None:
        return Origin.of_source(HFSource.open(checkpoint.hf_checkpoint))
    if checkpoint.load is None:
        return None
    folder = places.find(checkpoint.load, checkpoint.ckpt_step)
    return Origin.of_checkpoint(folder, distributed.read_extra(folder))
