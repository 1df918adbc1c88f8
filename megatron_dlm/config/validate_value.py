"""What cannot work with a value model, refused before anything is built. The rules are those of `validate`."""

from __future__ import annotations

import dataclasses

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.validate import above, at_least, within
from megatron_dlm.config.validate_schedule import check_length, check_schedule
from megatron_dlm.config.value import ValueConfig


def check_value(value: ValueConfig, num_rollout: int) -> None:
    """Refuse settings of the value model that cannot work, or that nobody would read.

    Args:
        num_rollout: RL steps of the run.
    """
    if not value.use_value_model:
        for field in dataclasses.fields(value):
            if getattr(value, field.name) != field.default:
                raise ConfigError(
                    f"{flag_name(field.name)} {getattr(value, field.name)} does nothing without --use-value-model. "
                    "Add that, or leave it out."
                )
        return
    within(value, 0, 1, "gamma", "gae_lambda")
    above(value, 0, "value_eps_clip", "value_lr", "value_adam_eps")
    within(value, 0, 1, "value_adam_beta1", "value_adam_beta2", high_open=True)
    at_least(value, 0, "value_clip_grad", "value_warmup_steps")
    at_least(value, 1, "value_interval")
    check_schedule(value, "value_")
    if value.value_warmup_steps >= num_rollout:
        raise ConfigError(
            f"--value-warmup-steps {value.value_warmup_steps} leaves the policy none of --num-rollout {num_rollout} RL "
            f"steps. Use fewer than {num_rollout}."
        )


def check_value_schedule(value: ValueConfig, updates: int) -> None:
    """Refuse a warm-up that is not shorter than the schedule. `updates`: of the value model in the whole run."""
    if value.use_value_model:
        check_length(value, updates, "the updates of the value model", "value_")
