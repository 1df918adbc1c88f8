"""Which groups of responses can be learned from, said once for the whole loop.

A group teaches by its differences: where rewards are equal (and speeds, if these are rewarded), every advantage is 0.
And it should be neither too easy
nor too hard for the policy: its share of right responses lies within --min-group-accuracy and --max-group-accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.rl.advantages import in_band
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.rewards import group_earnings


class Level(StrEnum):
    """What a group is for the policy."""

    TOO_EASY = "too_easy"
    USABLE = "usable"
    TOO_HARD = "too_hard"


def level(records: Sequence[Graded], rl: RLConfig, reward: RewardConfig | None = None) -> Level:
    """Of a group, by all of its records. One within the band that has nothing to teach counts as too easy if at least
    half of its responses are right.

    Args:
        reward: what is rewarded; by default the verdict alone.
    """
    accuracies = [record.accuracy for record in records]
    mean = sum(accuracies) / len(accuracies)
    if not in_band(accuracies, rl.min_group_accuracy, rl.max_group_accuracy):
        return Level.TOO_HARD if mean < rl.min_group_accuracy else Level.TOO_EASY
    if not group_earnings(records, reward or RewardConfig()).any():
        return Level.TOO_HARD if mean < 0.5 else Level.TOO_EASY
    return Level.USABLE


def usable(records: Sequence[Graded], rl: RLConfig, reward: RewardConfig | None = None) -> bool:
    """Whether the group can be learned from. Args: as `level`."""
    return level(records, rl, reward) is Level.USABLE
