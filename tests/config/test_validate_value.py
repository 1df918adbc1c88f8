"""Settings of the value model: what is refused, and the optimizer that they make."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.validate_value import check_value, check_value_schedule
from megatron_dlm.config.value import ValueConfig, learns_in, num_updates, optimizer_config, policy_updates

USED = ValueConfig(use_value_model=True)


def test_defaults_pass() -> None:
    check_value(ValueConfig(), 1)
    check_value(USED, 1)
    check_value_schedule(USED, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(gamma=1.1), "--gamma is 1.1"),
        (dict(gae_lambda=-0.1), "--gae-lambda is -0.1"),
        (dict(value_eps_clip=0.0), "--value-eps-clip is 0.0"),
        (dict(value_lr=0.0), "--value-lr is 0.0"),
        (dict(value_adam_beta2=1.0), "--value-adam-beta2 is 1.0"),
        (dict(value_interval=0), "--value-interval is 0"),
        (dict(value_clip_grad=-1.0), "--value-clip-grad is -1.0"),
        (dict(value_min_lr=1e-3), "--value-min-lr 0.001 is above --value-lr 5e-06"),
        (dict(value_warmup_steps=5), "--value-warmup-steps 5 leaves the policy none of --num-rollout 5"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_value(dataclasses.replace(USED, **changes), 5)


@pytest.mark.parametrize("changes", [dict(gamma=0.9), dict(value_load="x"), dict(value_order="after")])
def test_settings_that_nobody_would_read_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match="does nothing without --use-value-model"):
        check_value(ValueConfig(**changes), 5)


def test_a_warm_up_needs_a_schedule_that_is_longer() -> None:
    warm = dataclasses.replace(USED, value_lr_warmup_iters=4)
    check_value_schedule(warm, 5)
    with pytest.raises(ConfigError, match="--value-lr-warmup-iters 4 leaves nothing of the updates of the value model"):
        check_value_schedule(warm, 4)
    with pytest.raises(ConfigError, match="leaves nothing of --value-lr-decay-iters, 3 steps"):
        check_value_schedule(dataclasses.replace(warm, value_lr_decay_iters=3), 5)


def test_every_field_of_the_optimizer_is_the_value_models_own_but_its_rule_and_its_place() -> None:
    names = [field.name for field in dataclasses.fields(OptimizerConfig)]
    of_value = {field.name for field in dataclasses.fields(ValueConfig)}
    own = {name: n + 0.5 for n, name in enumerate(names) if f"value_{name}" in of_value}
    policys = dict(
        optimizer="sgd",
        sgd_momentum=0.9,
        no_weight_decay_embeddings=True,
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=0.5,
        overlap_cpu_optimizer_d2h_h2d=True,
    )
    made = optimizer_config(
        ValueConfig(**{f"value_{name}": number for name, number in own.items()}), OptimizerConfig(**policys)
    )
    assert set(names) - set(own) == set(policys)
    assert {name: getattr(made, name) for name in names} == own | policys


@pytest.mark.parametrize(("use", "warmup", "updates"), [(True, 3, 28), (True, 0, 40), (False, 3, 40)])
def test_the_policy_learns_in_the_steps_in_which_it_does_not_wait(use: bool, warmup: int, updates: int) -> None:
    assert policy_updates(ValueConfig(use_value_model=use, value_warmup_steps=warmup), 10, 4) == updates


def test_when_it_learns() -> None:
    value = dataclasses.replace(USED, value_interval=3, value_warmup_steps=2)
    steps = [step for step in range(10) if learns_in(value, step)]
    assert steps == [0, 1, 3, 6, 9] and num_updates(value, 0, 10, 4) == 20 and num_updates(value, 2, 7, 1) == 2
