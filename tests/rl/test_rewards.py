"""What responses earn, against the rules written out for one response at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.diffusion.planner import Load
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.normalise import Counts
from megatron_dlm.rl.rewards import chunk_rewards, group_earnings, shaped_rewards

LIMIT = 100


def graded(sample: int = 0, correct: float = 1.0, length: int = 10, group: str = "g", **others) -> Graded:
    return Graded(
        group=group, sample=sample, owner=0, index=0, correct=correct, reward=0.0, length=length, steps=length,
        truncated=False, judge_failed=False, load=Load(group, 0, length), counts=Counts(length, length, length, length),
        **{"overlong": False, "forwards": length} | others,
    )  # fmt: skip


GROUP = [
    graded(0, 1.0, 10, form=1.0, forwards=5),
    graded(1, 0.0, 90, form=1.0, forwards=90, score=0.75),
    graded(2, 1.0, 99, form=0.0, forwards=33, overlong=True, score=1.0),
    graded(3, 1.0, 50, form=0.0, forwards=50, score=1.0),
]


def combine(group, config, limit):
    """(rewards, advantages) of records whose rewards are not set yet."""
    rewards = shaped_rewards(group, config, limit)
    rewarded = [dataclasses.replace(one, reward=float(reward)) for one, reward in zip(group, rewards)]
    return rewards, group_earnings(rewarded, config)


def z_scores(values):
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    return np.array([(value - mean) / deviation for value in values])


def test_alone_a_verdict_counts_unless_the_response_is_too_long():
    rewards, advantages = combine(GROUP, RewardConfig(), LIMIT)
    assert rewards.tolist() == [1, 0, 0, 1]
    np.testing.assert_allclose(advantages, [1, -1, -1, 1])


def test_scores_count_where_a_judge_gives_them():
    assert shaped_rewards(GROUP, RewardConfig(reward_value="score"), LIMIT).tolist() == [1, 0.75, 0, 1]


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"format_reward": "boxed"}, [0.1, 0.1, 0, 0]),
        ({"format_reward": "think", "format_reward_coef": 2.0}, [2, 2, 0, 0]),
        ({"format_reward_coef": 2.0}, [0, 0, 0, 0]),
        ({"overlong_buffer_len": 20, "overlong_penalty_coef": 2.0}, [0, -1, -1.9, 0]),
        ({"short_reward_coef": 0.5}, [0.25, 0.5 * (0.5 - 80 / 89), -0.25, 0.5 * (0.5 - 40 / 89)]),
    ],
)
def test_what_else_is_rewarded(settings, added):
    found = shaped_rewards(GROUP, RewardConfig(**settings), LIMIT)
    np.testing.assert_allclose(found, np.array([1, 0, 0, 1]) + added, atol=1e-12)


def test_a_response_that_is_too_long_is_a_wrong_one_for_its_length():
    """It would gain by being short, were it right."""
    group = [graded(0, 1.0, 10, overlong=True), graded(1, 0.0, 20)]
    assert shaped_rewards(group, RewardConfig(short_reward_coef=1.0), LIMIT).tolist() == [0.0, -0.5]


@pytest.mark.parametrize("by_std", [True, False])
def test_speed_is_normalised_apart_from_the_reward(by_std):
    """The same advantages in speed, whatever the size of the rewards."""
    config = RewardConfig(speed_reward_coef=0.5)
    speeds = z_scores([2.0, 1.0, 3.0, 1.0])
    for size in (1.0, 100.0):
        group = [dataclasses.replace(one, reward=size * reward) for one, reward in zip(GROUP, [1, 0, 0, 1])]
        expected = np.array([1, -1, -1, 1]) * (1.0 if by_std else size / 2) + 0.5 * speeds
        np.testing.assert_allclose(group_earnings(group, config, by_std), expected, atol=1e-12)


def test_speed_of_right_responses_alone():
    config = RewardConfig(speed_reward_coef=1.0, speed_reward_of="correct")
    _, advantages = combine(GROUP, config, LIMIT)
    np.testing.assert_allclose(advantages, [1 + 1, -1, -1, 1 - 1], atol=1e-12)  # the third is right, and too long


def test_equal_rewards_and_speeds_teach_nothing():
    group = [graded(n, 1.0, 10) for n in range(3)]
    assert not combine(group, RewardConfig(speed_reward_coef=1.0), LIMIT)[1].any()
    faster = [*group, graded(3, 1.0, 10, forwards=5)]
    assert combine(faster, RewardConfig(speed_reward_coef=1.0), LIMIT)[1].any()


def test_chunks_are_compared_within_their_group():
    records = [
        graded(0, chunks=(1.0, -1.0)), graded(1, chunks=(0.0,)), graded(0, group="h", chunks=(1.0,)),
        graded(1, group="h", chunks=(1.0,)), graded(0, group="i"),
    ]  # fmt: skip
    assert chunk_rewards(records) == {
        ("g", 0): (1.0, -1.0), ("g", 1): (-1.0,), ("h", 0): (0.0,), ("h", 1): (0.0,), ("i", 0): ()
    }  # fmt: skip
