"""From what a judge says about the parts of a response to rewards of its tokens.

    ends     = chunk_ends(length, 200, prompt_length, block_size)       # where the parts of a response end
    scores   = judge(...)                                               # one per part (rewards/process.py)
    rewards  = normalise([scores of each response of the group])        # against the same part of the others
    token    = scatter(rewards, ends, steps, block_size)                # onto the tokens that finished each part

A response is cut into chunks of so many tokens. The judge sees the response up to the end of a chunk, so its word is
about the state in which the chunk was finished: the reward goes to the tokens of the last denoising step of the chunk's
last block, and that of the last chunk to the tokens of the response's last step.

The published code counts its blocks back from the end of each chunk, wherever that is; unless a chunk happens to end
with a decoding block, such a window holds tokens of two blocks, and the later block takes the reward whatever of it the
judge has seen. Here a chunk ends with the block that it reaches into (`block_size` given to `chunk_ends`); without it
the published windows come out.

Source: process rewards of TraceRL, arXiv 2509.06949, section 4.3, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def chunk_ends(length: int, chunk_tokens: int, prompt_length: int = 0, block_size: int = 1) -> tuple[int, ...]:
    """Where the chunks of a response end, counted in its tokens; the last is its length.

    Args:
        length: tokens of the response.
        chunk_tokens: tokens per chunk, at least 1.
        prompt_length: tokens before it, on whose grid the blocks stand.
        block_size: a chunk ends with the block that it reaches into; with 1 after `chunk_tokens` exactly.

    Returns:
        Growing; empty for an empty response.
    """
    ends = []
    for wanted in range(chunk_tokens, length, chunk_tokens):
        end = wanted + -(prompt_length + wanted) % block_size
        if end < length and (not ends or end > ends[-1]):
            ends.append(end)
    return (*ends, length) if length else ()


def normalise(scores: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Scores of each chunk against the chunks of the same index of the other responses to the prompt.

    Args:
        scores: [G] sequences, one score per chunk; an empty one for a response that was not judged.

    Returns:
        The same shape: score minus mean, over the population standard deviation (0 if that is 0), among the responses
        that have this chunk. Where only one has it, its score stays as it is.
    """
    normal = [list(map(float, own)) for own in scores]
    for index in range(max(map(len, normal), default=0)):
        having = [own for own in normal if len(own) > index]
        if len(having) == 1:
            continue
        values = np.array([own[index] for own in having])
        spread = values.std() if np.ptp(values) else 0.0  # rounding can make that of equal scores a tiny number
        for own, value in zip(having, (values - values.mean()) / spread if spread else np.zeros_like(values)):
            own[index] = float(value)
    return [tuple(own) for own in normal]


def scatter(
    rewards: Sequence[float],
    ends: Sequence[int],
    steps: np.ndarray,
    block_size: int,
    trainable: np.ndarray | None = None,
) -> np.ndarray:
    """Rewards of tokens from rewards of chunks.

    Args:
        rewards: one per chunk; empty for a response that was not judged, which earns nothing.
        ends: of the chunks, as `chunk_ends` gave them.
        steps: int [R], step of each response token, counted over the whole response; shrunk, if steps are merged.
        block_size: decoding block.
        trainable: bool [R], the tokens that are learned; no other is given a reward. None: all of them.

    Returns:
        float64 [R]: a chunk's reward at those of its last `block_size` tokens that have the largest step there; of the
        last chunk at all tokens of the response that have its largest step. Where two chunks fall on the same token
        (without a grid the last one may end in the block of the one before), they add up.

    Raises:
        ValueError: not one reward per chunk, or chunks that do not end with the response.
    """
    steps = np.asarray(steps)
    token_rewards = np.zeros(len(steps), dtype=np.float64)
    if not len(rewards):
        return token_rewards
    if len(rewards) != len(ends) or ends[-1] != len(steps):
        raise ValueError(f"{len(rewards)} rewards for chunks that end at {list(ends)}, of {len(steps)} tokens")
    windows = [slice(max(start, end - block_size), end) for start, end in zip((0, *ends), ends[:-1])]
    learned = np.ones(len(steps), dtype=bool) if trainable is None else np.asarray(trainable, dtype=bool)
    for reward, window in zip(rewards, [*windows, slice(None)]):
        if learned[window].any():
            last = learned[window] & (steps[window] == steps[window][learned[window]].max())
            token_rewards[window][last] += reward
    return token_rewards
