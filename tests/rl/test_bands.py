"""Which groups can be learned from."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.rl.bands import Level, level, usable
from megatron_dlm.rl.exchange import by_group

RL = RLConfig(min_group_accuracy=0.2, max_group_accuracy=0.8)
WIDE = dataclasses.replace(RL, min_group_accuracy=0.0, max_group_accuracy=1.0)


def group(right: int, of: int, rewards=None) -> list:
    accuracies = [1.0] * right + [0.0] * (of - right)
    return [SimpleNamespace(accuracy=a, reward=r) for a, r in zip(accuracies, rewards or accuracies, strict=True)]


@pytest.mark.parametrize("of", [5, 10])
def test_the_band_holds_its_ends(of: int) -> None:
    for right in range(of + 1):
        expected = Level.TOO_HARD if right * 5 < of else Level.TOO_EASY if right * 5 > 4 * of else Level.USABLE
        assert level(group(right, of), RL) is expected
        assert usable(group(right, of), RL) == (expected is Level.USABLE)


def test_equal_rewards_teach_nothing_whatever_the_band() -> None:
    assert level(group(4, 4), WIDE) is Level.TOO_EASY and level(group(0, 4), WIDE) is Level.TOO_HARD
    assert (
        level(group(2, 4, [0.5] * 4), WIDE) is Level.TOO_EASY and level(group(1, 4, [0.0] * 4), WIDE) is Level.TOO_HARD
    )
    assert usable(group(1, 4), WIDE)


def test_rewards_that_differ_do_not_open_the_band() -> None:
    """Its ends are about right answers, whatever else is rewarded."""
    assert level(group(0, 4, [0.1, 0.0, 0.0, 0.0]), RL) is Level.TOO_HARD
    assert level(group(4, 4, [1.0, 0.9, 1.0, 1.0]), RL) is Level.TOO_EASY
    assert usable(group(4, 4, [1.0, 0.9, 1.0, 1.0]), WIDE)


def test_groups_keep_their_order() -> None:
    records = [SimpleNamespace(group=name, sample=n) for n, name in enumerate("abacb")]
    assert {key: [r.sample for r in members] for key, members in by_group(records).items()} == {
        "a": [0, 2], "b": [1, 4], "c": [3]
    }  # fmt: skip


def test_where_speed_is_rewarded_a_group_of_right_answers_teaches() -> None:
    records = [SimpleNamespace(accuracy=1.0, reward=1.0, length=10, forwards=forwards) for forwards in (10, 5, 4)]
    assert level(records, WIDE) is Level.TOO_EASY
    assert level(records, WIDE, RewardConfig(speed_reward_coef=0.1)) is Level.USABLE
    assert level(records, RL, RewardConfig(speed_reward_coef=0.1)) is Level.TOO_EASY
