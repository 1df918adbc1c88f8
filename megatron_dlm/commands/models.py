"""The models of an RL run beside its policy: the value model, the frozen reference and the teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_dlm.commands.value_weights import restore_value
from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import ConfigError, UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.validate import check_model, check_parallel
from megatron_dlm.config.validate_value import check_value_schedule
from megatron_dlm.config.value import num_updates, optimizer_config

_OF_THE_RUN = (
    "bf16",
    "fp64",
    "init_method_std",
    "make_vocab_size_divisible_by",
)  # whatever the weights were trained in


def open_models(config: dict[str, Any], session, policy, updates_per_step: int, restored: dict[str, Any], say):
    """All models of an RL run. Collective.

    Args:
        config: sections of `tracerl`, checked. policy: with its weights.
        updates_per_step: optimizer steps in an RL step that learns from all its responses.
        restored: what `weights.restore` returned.
    """
    from megatron_dlm.config.objective import with_method
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.rl.learner import Models

    rl, value = with_method(config["rl"]), config["value"]
    value_state = reference = teacher = None
    if value.use_value_model:
        count = num_updates(value, 0, rl.num_rollout, updates_per_step)
        check_value_schedule(value, count)
        value_state = session.value_state(optimizer_config(value, config["optimizer"]), count)
        say(restore_value(value_state, policy, config["checkpoint"], value.value_load, session.model, restored))
    if rl.kl_reference == "frozen":
        reference = open_reference(session, rl.ref_load)
        say(f"The KL penalty holds on to {rl.ref_load}")
    if rl.distill_coef:
        teacher = open_teacher(session, rl.teacher_load, Grid(session.grid.block_size, rl.grid_anchor))
        say(f"The teacher is {rl.teacher_load}")
    return Models(policy, value_state, reference, teacher)


def open_reference(session, folder: str):
    """The frozen reference of --ref-load, a model like the policy. Collective."""
    return _frozen(session, folder, session.model, "--ref-load")


def open_teacher(session, folder: str, grid):
    """The teacher of --teacher-load, whose sizes its checkpoint tells. Collective.

    Args:
        grid: of the policy's training.

    Raises:
        ConfigError: it does not fit the tokenizer, or the layout of the run.
    """
    from megatron_dlm.rl.teacher import Teacher

    model = _model_of(folder, session.model)
    if model.vocab_size != session.model.vocab_size:
        raise ConfigError(
            f"--teacher-load {folder} has {model.vocab_size} tokens, and this model has {session.model.vocab_size}. "
            "Use a teacher with the same tokenizer."
        )
    try:
        check_model(model)
        check_parallel(session.parallel, model, session.groups.world_size)
    except ConfigError as error:
        raise ConfigError(f"--teacher-load {folder} does not fit this run. {error}") from None
    return Teacher(_frozen(session, folder, model, "--teacher-load"), model, grid)


def _frozen(session, folder: str, model: ModelConfig, flag: str):
    from megatron_dlm.commands.weights import restore

    state = dataclasses.replace(session, model=model).train_state(None, 1)
    where = LoadConfig(hf_checkpoint=folder) if _is_hf(folder) else LoadConfig(load=folder)
    try:
        restore(state, where, model, stage=None, any_block_size=True)
    except UserError as error:
        raise type(error)(str(error).replace("--hf-checkpoint", flag).replace("--load", flag)) from None
    return state


def _model_of(folder: str, policy: ModelConfig) -> ModelConfig:
    """The resolved sizes of a checkpoint's model, in the precision of this run."""
    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.model.shape import resolve

    if _is_hf(folder):
        known = HFSource.open(folder).fields
    else:
        known = distributed.read_extra(places.find(folder, None)).get("model", {})
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    known = {name: value for name, value in known.items() if name in fields}
    known |= {name: getattr(policy, name) for name in _OF_THE_RUN}
    return resolve(ModelConfig(**known), policy.vocab_size)


def _is_hf(folder: str) -> bool:
    return (Path(folder) / "config.json").is_file()
