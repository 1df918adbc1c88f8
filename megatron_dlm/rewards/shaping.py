"""What a response earns by its length, whatever it says.

Pure functions of lengths and verdicts; how they enter the reward is written in rl/rewards.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def overlong_penalty(lengths: Sequence[int], limit: int, buffer_len: int) -> np.ndarray:
    """A penalty that grows towards the longest response allowed.

    0 up to `limit - buffer_len` tokens, then falling on a straight line to -1 at `limit`, and -1 beyond it.

    Args:
        lengths: [G], tokens.
        limit: longest response allowed, tokens.
        buffer_len: tokens before the limit within which the penalty grows; 0 gives no penalty at all.

    Returns:
        float64 [G] in [-1, 0].

    Source: soft over-long punishment of DAPO, arXiv 2503.14476, equation 13.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    if not buffer_len:
        return np.zeros_like(lengths)
    return np.clip((limit - buffer_len - lengths) / buffer_len, -1.0, 0.0)


def short_reward(lengths: Sequence[int], correct: Sequence[float]) -> np.ndarray:
    """A reward for being shorter than the others of the group.

    0.5 - (length - shortest) / (longest - shortest), where shortest and longest are those of the whole group; a wrong
    response gets no more than 0, so that it never gains by being short. 0 for all where all are equally long.

    Args:
        lengths: [G], tokens.
        correct: [G], 1 or 0.

    Returns:
        float64 [G] in [-0.5, 0.5].

    Source: length reward of Kimi k1.5, arXiv 2501.12599, section 2.3.3.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    shortest, longest = lengths.min(), lengths.max()
    if shortest == longest:
        return np.zeros_like(lengths)
    reward = 0.5 - (lengths - shortest) / (longest - shortest)
    return np.where(np.asarray(correct) > 0, reward, np.minimum(reward, 0.0))
