"""The models of an RL run beside its policy: the value model, the frozen reference and the teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_dlm.commands.value_weights import restore_value
from megatron_dlm.commands.weights import TOKENIZER
from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import NOT_OF_THE_WEIGHTS, ModelConfig
from megatron_dlm.config.parallel import without_recompute
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.validate import check_model, check_parallel
from megatron_dlm.config.validate_rl import DRAWN
from megatron_dlm.config.validate_value import check_value_schedule
from megatron_dlm.config.value import num_updates, optimizer_config

_OF_THE_RUN = (*NOT_OF_THE_WEIGHTS, "make_vocab_size_divisible_by")  # whatever the weights were trained in
_OTHER_TOKENS = 0.01  # of its ids that a tokenizer of the same family may have renamed: special and reserved ones


def open_models(config: dict[str, Any], session, policy, updates_per_step: int, restored: dict[str, Any], say):
    """All models of an RL run. Collective.

    Where the KV cache takes turns with gradients and optimizers (--offload-train and --offload-rollout), it is sized by
    the memory that it finds free; so the policy and the value model sleep then, each as soon as it has its weights.

    Args:
        config: sections of `tracerl`, checked. policy: with its weights.
        updates_per_step: optimizer steps in an RL step that learns from all its responses.
        restored: what `weights.restore` returned.
    """
    from megatron_dlm.config.objective import with_method
    from megatron_dlm.rl.learner import Models
    from megatron_dlm.training.sleep import sleep

    rl, value = with_method(config["rl"]), config["value"]
    sleeps = rl.offload_train and rl.offload_rollout
    value_state = reference = teacher = None
    if sleeps:
        sleep(policy)
    if value.use_value_model:
        count = num_updates(value, 0, rl.num_rollout, updates_per_step)
        check_value_schedule(value, count)
        value_state = session.value_state(optimizer_config(value, config["optimizer"]), count)
        say(restore_value(value_state, policy, config["checkpoint"], value.value_load, session.model, restored))
        if sleeps:
            sleep(value_state)
    if rl.kl_reference == "frozen":
        reference = open_reference(session, rl.ref_load)
        say(f"The KL penalty holds on to {rl.ref_load}")
    if rl.distill_coef:
        teacher = open_teacher(session, rl)
        say(f"The teacher is {rl.teacher_load}")
    return Models(policy, value_state, reference, teacher)


def open_reference(session, folder: str):
    """The frozen reference of --ref-load, a model like the policy. Collective.

    Raises:
        ConfigError: it has another tokenizer. CheckpointError: there is no such model.
    """
    _check_tokenizer(session, folder, "--ref-load")
    return _frozen(session, folder, session.model, "--ref-load")


def open_teacher(session, rl: RLConfig):
    """The teacher of --teacher-load, whose sizes its checkpoint tells. Collective.

    Args:
        rl: with the fields of its method.

    Raises:
        ConfigError: it does not fit the tokenizer, the layout of the run, or the states that are learned.
        CheckpointError: there is no such model.
    """
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.rl.teacher import Teacher

    folder = rl.teacher_load
    model = _model_of(folder, session.model, "--teacher-load")
    if model.vocab_size != session.model.vocab_size:
        raise ConfigError(
            f"--teacher-load {folder} has {model.vocab_size} tokens, and this model has {session.model.vocab_size}. "
            "Use a teacher with the same tokenizer."
        )
    _check_tokenizer(session, folder, "--teacher-load")
    try:
        check_model(model)
        check_parallel(without_recompute(session.parallel), model, session.groups.world_size)
    except ConfigError as error:
        raise ConfigError(f"--teacher-load {folder} does not fit this run. {error}") from None
    state = _frozen(session, folder, model, "--teacher-load")
    grid = Grid(session.grid.block_size, rl.grid_anchor)
    budget = rl.max_tokens_per_row // session.groups.cp_size  # its own rows are not shared
    teacher = Teacher(state, model, grid, rl.shrinkage, budget)
    if session.groups.cp_size > 1 and teacher.shares_rows and model.logit_shift != session.model.logit_shift:
        raise ConfigError(
            f"--teacher-load {folder} and this model read their logits at different tokens, which are not on the same "
            "process with --context-parallel-size. Use 1, or a teacher of the same kind."
        )
    if rl.rl_method in DRAWN and not teacher.knows_any_state:
        blocks = "full attention" if model.full_attention else f"blocks of {model.block_size}"
        raise ConfigError(
            f"--teacher-load {folder} has {blocks} and can be asked in states of the trace only, and --rl-method "
            f"{rl.rl_method} draws others. Use a teacher with the blocks of this model, or an autoregressive one."
        )
    return teacher


def _frozen(session, folder: str, model: ModelConfig, flag: str):
    from megatron_dlm.commands.weights import restore

    parallel = without_recompute(session.parallel)
    own = dataclasses.replace(session, model=model, parallel=parallel, attention=None, fused_head=None)
    state = own.train_state(None, 1)
    where = LoadConfig(hf_checkpoint=folder) if _is_hf(folder) else LoadConfig(load=folder)
    restore(state, where, model, stage=None, any_block_size=True, flag=flag)
    return state


def _check_tokenizer(session, folder: str, flag: str) -> None:
    """Refuse a checkpoint that brings another tokenizer than that of the run, by which its ids mean other words."""
    from megatron_dlm.checkpoint import places

    where = Path(folder) if _is_hf(folder) else places.find(folder, flag=flag) / TOKENIZER
    found = session.tokenizer.differing(where)
    if found is not None and found[0] > _OTHER_TOKENS * found[1]:
        raise ConfigError(
            f"{flag} {folder} has another tokenizer than --tokenizer-model {session.tokenizer.folder}: {found[0]} of "
            f"{found[1]} ids are other tokens there. Use a model with the same tokenizer."
        )


def _model_of(folder: str, policy: ModelConfig, flag: str) -> ModelConfig:
    """The resolved sizes of a checkpoint's model, in the precision of this run. `flag`: that named the folder."""
    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.checkpoint.hf.source import HFSource
    from megatron_dlm.model.shape import resolve

    if _is_hf(folder):
        known = HFSource.open(folder, flag).fields
    else:
        known = distributed.read_extra(places.find(folder, flag=flag), flag).get("model", {})
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    known = {name: value for name, value in known.items() if name in fields}
    known |= {name: getattr(policy, name) for name in _OF_THE_RUN}
    return resolve(ModelConfig(**known), policy.vocab_size)


def _is_hf(folder: str) -> bool:
    return (Path(folder) / "config.json").is_file()
