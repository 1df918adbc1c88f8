"""Whether a checkpoint belongs to this run: its stage, and the model that wrote it. Asked before any tensor is read.

Shapes alone do not tell: a model with another rotary base or norm epsilon has the same shapes and computes something
else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_dlm.config.errors import CheckpointError, ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.model import NOT_OF_THE_WEIGHTS, ModelConfig
from megatron_dlm.config.overrides import FLAG, of_the_function

_MAY_DIFFER = (
    *NOT_OF_THE_WEIGHTS,
    "model_preset",  # stands for the sizes that are compared
    "make_vocab_size_divisible_by",  # padding is no part of the function
    "transformer_overrides",  # compared below
)
VALUE_MODEL = "value_model"  # true in what is stored beside a value model's weights
_OF_ATTENTION, _OF_HEAD = ("block_size", "full_attention"), ("logit_shift",)


def check_stage(saved: dict[str, Any], stage: str, directory: str) -> None:
    """Refuse to resume a run of another stage. `saved`: what was stored beside the weights."""
    there = saved.get("stage")
    if there not in (None, stage):
        raise ConfigError(
            f"--load {directory} was written by {there}, and this is {stage}. Add --finetune to start {stage} from its "
            "weights."
        )


def check_kind(saved: dict[str, Any], value: bool, source: str) -> None:
    """Refuse a policy where a value model is wanted, and the other way round.

    Args:
        saved: what was stored beside the weights. value: whether they should be a value model's.
        source: the flag that named the weights, with its value.
    """
    if bool(saved.get(VALUE_MODEL)) == value:
        return
    if value:
        raise CheckpointError(
            f"{source} holds a policy, not a value model. Give the folder 'value' that a run with --use-value-model "
            "wrote within its --save."
        )
    raise CheckpointError(f"{source} holds a value model, not a policy. Give the folder above it.")


def check_same_model(
    saved: dict[str, Any], model: ModelConfig, source: str, finetune: bool = False, converts: bool = False
) -> None:
    """Refuse weights of a model that computes something else.

    Args:
        saved: what was stored beside the weights; without "model" there is nothing to compare.
        model: resolved.
        source: the flag that named the weights, with its value.
        finetune: whether a run starts from these weights; its block size may then be another, or its attention full
            (diffusion models grow their blocks this way).
        converts: whether an autoregressive model may become one of diffusion that predicts tokens in their own place.
    """
    stored = saved.get("model")
    if stored is None:
        return
    ahead = stored.get("block_size") == 1 and stored.get("logit_shift") == 1
    may_differ = _MAY_DIFFER + (_OF_ATTENTION if finetune else ()) + (_OF_HEAD if converts and ahead else ())
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        if name in may_differ or name not in stored:
            continue
        if stored[name] != getattr(model, name):
            raise CheckpointError(_sentence(flag_name(name), stored[name], getattr(model, name), source))
    one, other = of_the_function(stored.get("transformer_overrides", {})), of_the_function(model.transformer_overrides)
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            raise CheckpointError(_sentence(f"{FLAG} {name}", one.get(name), other.get(name), source))


def _sentence(flag: str, stored: object, wanted: object, source: str) -> str:
    grow = ", or --finetune to go on with another block size" if flag == "--block-size" else ""
    shown = [("unset" if value is None else str(value)) for value in (stored, wanted)]
    advice = f"Use {shown[0]}{grow}" if stored is not None else "Leave it out"
    return f"The model in {source} has {flag} {shown[0]}, and this one {shown[1]}. {advice}."
