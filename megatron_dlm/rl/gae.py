"""Generalised advantage estimation over the denoising steps of a trajectory, mapped back to its tokens.

The trajectory of a response is its denoising steps, over all blocks, in order; with shrinkage the merged ones that
training sees. The tokens of one step are decided together, so reward and value of step t are the means over its tokens:

    r*_t, V*_t = means of r_j and V_j over the tokens j of step t       (nothing comes after the last step: zeros)
    R*_t = r*_t + gamma R*_{t+1}
    A*_t = r*_t - V*_t + gamma V*_{t+1} + gamma lambda A*_{t+1}

and a token of step t gets what is its own from itself, and the future from the steps:

    R_j = r_j + gamma R*_{t+1}
    A_j = r_j - V_j + gamma V*_{t+1} + gamma lambda A*_{t+1}

Tokens that are not learned are no part of the trajectory. Pure functions of arrays, float64.

Source: the diffusion value model of TraceRL, arXiv 2509.06949.
"""

from __future__ import annotations

import numpy as np

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.trace import Trace, shrink


def step_gae(
    steps: np.ndarray, rewards: np.ndarray, values: np.ndarray, trainable: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of the tokens of one response.

    Args:
        steps: int [R], the step at which each token was decided; only order and equality matter.
        rewards, values: float [R]. trainable: bool [R], the tokens that are learned.
        gamma: discount per step. lam: lambda; 1 takes the rewards that came, 0 trusts the next step's value.

    Returns:
        (advantages, returns), float64 [R] each, 0 at tokens that are not learned.
    """
    advantages, returns = np.zeros(len(steps)), np.zeros(len(steps))
    if not np.any(trainable):
        return advantages, returns
    own_reward = np.asarray(rewards, dtype=np.float64)[trainable]
    own_value = np.asarray(values, dtype=np.float64)[trainable]
    _, step, size = np.unique(np.asarray(steps)[trainable], return_inverse=True, return_counts=True)
    reward = np.bincount(step, own_reward) / size
    value = np.append(np.bincount(step, own_value) / size, 0.0)
    return_of, advantage_of = np.zeros(len(size) + 1), np.zeros(len(size) + 1)
    for t in range(len(size) - 1, -1, -1):
        return_of[t] = reward[t] + gamma * return_of[t + 1]
        advantage_of[t] = reward[t] - value[t] + gamma * value[t + 1] + gamma * lam * advantage_of[t + 1]
    after = step + 1
    returns[trainable] = own_reward + gamma * return_of[after]
    advantages[trainable] = own_reward - own_value + gamma * value[after] + gamma * lam * advantage_of[after]
    return advantages, returns


def outcome_rewards(steps: np.ndarray, trainable: np.ndarray, value: float) -> np.ndarray:
    """Token rewards float64 [R] of a response that is rewarded as a whole: `value` at each learned token of the last
    step that has one.
    """
    rewards = np.zeros(len(steps))
    if np.any(trainable):
        steps = np.asarray(steps)
        rewards[trainable & (steps == steps[trainable].max())] = value
    return rewards


def learned_steps(trace: Trace, grid: Grid, shrinkage: int = 1) -> np.ndarray:
    """The step, int64 [R], in which training sees each response token decided (`trace_views`): within each attention
    block `shrinkage` neighbouring steps are one. A merged step has the number of the last of them, so numbers still
    grow from block to block.
    """
    steps = np.array(trace.all_steps, dtype=np.int64)
    prompt = len(trace.prompt_ids)
    block = np.asarray(grid.block_of(prompt + np.arange(len(steps)), prompt))
    if shrinkage > 1:
        for one in np.unique(block):
            steps[block == one] = shrink(steps[block == one], shrinkage)
    return steps[: len(trace.response_ids)]
