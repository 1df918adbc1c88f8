"""From rewards to advantages, within the group of a prompt.

Rewards may be any numbers: verdicts, 0 or 1, with what a response earns besides them (rl/rewards.py).

Source: TraceRL, arXiv 2509.06949, section 4.2, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def overlong(lengths: Sequence[int], max_response_len: int, margin: int) -> np.ndarray:
    """bool: responses that end within `margin` tokens of the limit count as wrong, for they were cut or nearly so."""
    return np.asarray(lengths) >= max_response_len - margin


def group_advantages(rewards: Sequence[float], normalize_by_std: bool = True) -> np.ndarray:
    """Advantages of the responses to one prompt: reward minus the group's mean, over its population standard deviation
    (all 0 if that is 0).

    Args:
        rewards: [G].
        normalize_by_std: False leaves the division out.

    Returns:
        float64 [G].
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.max() == rewards.min():  # rounding can make the deviation of equal rewards a tiny number instead of 0
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / rewards.std() if normalize_by_std else centred


def speed_advantages(
    tokens_per_forward: Sequence[float],
    correct: Sequence[float],
    min_range: float = 0.01,
    only_correct: bool = False,
) -> np.ndarray:
    """Advantages in speed, to be added, with a coefficient, to those in reward: normalised apart from them, for in a
    sum of both the one that varies more would drown the other.

    Args:
        tokens_per_forward: [G], response tokens per model pass.
        correct: [G], 1 or 0.
        min_range: a group whose speeds differ by less teaches nothing about speed.
        only_correct: compare the right responses with each other, and give the wrong ones 0: a fast wrong answer then
            gains nothing.

    Returns:
        float64 [G]: speed minus the mean, over the population standard deviation; 0 where the range is too small.

    Source: LightningRL, arXiv 2603.13319, which compares all responses, and leaves a prompt of too small a range out
        altogether instead of its speed term only.
    """
    speeds = np.asarray(tokens_per_forward, dtype=np.float64)
    advantages = np.zeros_like(speeds)
    compared = np.asarray(correct) > 0 if only_correct else np.ones(len(speeds), dtype=bool)
    chosen = speeds[compared]
    if len(chosen) and np.ptp(chosen) >= min_range:
        advantages[compared] = group_advantages(chosen)
    return advantages


def in_band(rewards: Sequence[float], low: float, high: float) -> bool:
    """Whether the group's mean reward lies in [low, high]: neither too hard nor too easy to learn from."""
    return low <= float(np.mean(rewards)) <= high
