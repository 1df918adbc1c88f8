"""What a response earns, and what it is worth within its group.

    rewards    = shaped_rewards(group, config, limit)          # verdict or score, form, length
    advantages = group_earnings(group, config, by_std)         # of the rewards, plus those in speed

A group is the records of all responses to one prompt. Groups are chosen (too easy, too hard) by their share of right
responses, never by these rewards.

    reward    =   (0 if over-long, else 1 or 0, or the judge's score)
                + format_reward_coef      x form
                + overlong_penalty_coef   x overlong_penalty     (shaping.py)
                + short_reward_coef       x short_reward         (shaping.py)
    advantage =   z-score of the reward in the group
                + speed_reward_coef       x z-score of tokens per forward in the group (advantages.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.rewards.shaping import overlong_penalty, short_reward
from megatron_dlm.rl.advantages import group_advantages, speed_advantages
from megatron_dlm.rl.exchange import Graded, by_group
from megatron_dlm.rl.process import normalise


def verdict_value(record: Graded, reward_value: str) -> float:
    """What the verdict alone is worth: 1 or 0 ('correct'), or the judge's score where there is one ('score'); 0 for a
    response that is over-long."""
    if record.overlong:
        return 0.0
    return record.correct if reward_value == "correct" or record.score is None else record.score


def shaped_rewards(group: Sequence[Graded], config: RewardConfig, limit: int) -> np.ndarray:
    """Rewards of the responses of a group.

    Args:
        group: records of all G responses to one prompt; their `reward` is not read.
        limit: longest response allowed, tokens.

    Returns:
        float64 [G].
    """
    lengths, right = [record.length for record in group], [record.accuracy for record in group]
    rewards = np.array([verdict_value(record, config.reward_value) for record in group], dtype=np.float64)
    if config.format_reward is not None:
        rewards += config.format_reward_coef * np.array([record.form for record in group])
    if config.overlong_buffer_len:
        rewards += config.overlong_penalty_coef * overlong_penalty(lengths, limit, config.overlong_buffer_len)
    if config.short_reward_coef:
        rewards += config.short_reward_coef * short_reward(lengths, right)
    return rewards


def group_earnings(group: Sequence[Graded], config: RewardConfig, normalize_by_std: bool = True) -> np.ndarray:
    """Advantages of the responses of a group; all 0 where it has nothing to teach.

    Args:
        group: records of all G responses to one prompt, with their rewards.
        normalize_by_std: as in `group_advantages`, for the rewards; speed is always divided.

    Returns:
        float64 [G].
    """
    advantages = group_advantages([record.reward for record in group], normalize_by_std)
    if config.speed_reward_coef:
        speeds = [record.length / max(record.forwards, 1) for record in group]
        right = [record.accuracy for record in group]
        faster = speed_advantages(speeds, right, config.speed_min_range, config.speed_reward_of == "correct")
        advantages = advantages + config.speed_reward_coef * faster
    return advantages


def chunk_rewards(graded: Sequence[Graded]) -> Mapping[tuple[str, int], tuple[float, ...]]:
    """Rewards of the chunks of every response, by (group, sample): their scores against those of the same chunk of the
    other responses of the group (process.py). Empty for responses that were not judged."""
    return {
        (record.group, record.sample): own
        for group in by_group(graded).values()
        for record, own in zip(group, normalise([record.chunks for record in group]))
    }
