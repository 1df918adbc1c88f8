"""From rewards to advantages, within the group of a prompt.

Source: TraceRL, arXiv 2509.06949, section 4.2, and its published code. Rewards are 0 or 1 here, but nothing below needs
    that.
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


def in_band(rewards: Sequence[float], low: float, high: float) -> bool:
    """Whether the group's mean reward lies in [low, high]: neither too hard nor too easy to learn from."""
    return low <= float(np.mean(rewards)) <= high
