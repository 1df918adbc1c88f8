"""From scores of chunks to rewards of tokens, against the rules written out token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_dlm.rl.process import chunk_ends, normalise, scatter


@pytest.mark.parametrize(
    ("length", "chunk", "ends"), [(0, 5, ()), (1, 5, (1,)), (5, 5, (5,)), (6, 5, (5, 6)), (14, 5, (5, 10, 14)),
                                  (3, 1, (1, 2, 3))]
)  # fmt: skip
def test_chunks_without_a_grid(length, chunk, ends):
    assert chunk_ends(length, chunk) == ends


@pytest.mark.parametrize("prompt", range(9))
@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 10, 50])
def test_chunks_end_with_a_block(prompt, chunk):
    """Walk over the tokens; a chunk is full once it has so many, and ends where the block of its last token does."""
    length, block, expected = 37, 4, []
    wanted = chunk
    for token in range(length):
        ends_block = (prompt + token + 1) % block == 0
        if token + 1 >= wanted and ends_block:
            expected.append(token + 1)
            while wanted <= token + 1:
                wanted += chunk
    if not expected or expected[-1] != length:
        expected.append(length)
    assert chunk_ends(length, chunk, prompt, block) == tuple(expected)


def test_scores_are_compared_with_the_same_chunk_of_the_others():
    found = normalise([(1.0, -1.0, 0.5), (0.0, 1.0), (1.0,), ()])
    a, b = (1 - 2 / 3) / (2 / 9) ** 0.5, (0 - 2 / 3) / (2 / 9) ** 0.5
    expected = [(a, -1.0, 0.5), (b, 1.0), (a,), ()]  # only one has a third chunk: raw
    for own, wanted in zip(found, expected, strict=True):
        assert own == pytest.approx(wanted)


def test_equal_scores_say_nothing():
    assert normalise([(0.1, 1.0), (0.1, 1.0), (0.1, 1.0)]) == [(0.0, 0.0)] * 3
    assert normalise([]) == [] and normalise([(), ()]) == [(), ()]


def slow_scatter(rewards, ends, steps, block, learned):
    """Token by token, and for the last chunk over the whole response."""
    given = [0.0] * len(steps)
    for index, (reward, end) in enumerate(zip(rewards, ends, strict=True)):
        start = ends[index - 1] if index else 0
        candidates = [j for j in range(len(steps)) if learned[j]]
        if index + 1 < len(ends):
            candidates = [j for j in candidates if start <= j < end and j >= end - block]
        for j in candidates:
            if all(steps[k] <= steps[j] for k in candidates):
                given[j] += reward
    return given


@pytest.mark.parametrize("on_grid", [True, False])
def test_rewards_of_tokens(on_grid):
    draw = random.Random(5)
    for _ in range(200):
        block, prompt, length, chunk = (
            draw.choice([1, 2, 4]),
            draw.randint(0, 6),
            draw.randint(1, 30),
            draw.randint(1, 9),
        )
        steps, step = [], 0
        for first in range(-(prompt % block), length, block):
            places = [j for j in range(first, first + block) if 0 <= j < length]
            own = {j: draw.randint(1, block) for j in places}
            steps += [step + own[j] for j in places]
            step += block
        learned = [draw.random() < 0.8 for _ in range(length)]
        ends = chunk_ends(length, chunk, prompt, block if on_grid else 1)
        rewards = [draw.choice([-1.0, 0.0, 0.7]) for _ in ends]
        found = scatter(rewards, ends, np.array(steps), block, np.array(learned))
        assert found.dtype == np.float64
        assert found.tolist() == pytest.approx(slow_scatter(rewards, ends, steps, block, learned))


def test_the_last_chunk_rewards_the_last_step_of_all():
    steps = np.array([1, 2, 2, 1, 3, 4, 3, 4, 6, 5])
    found = scatter([1.0, 2.0, 3.0], (4, 8, 10), steps, 4)
    assert found.tolist() == [0, 1, 1, 0, 0, 2, 0, 2, 3, 0]


def test_a_response_that_was_not_judged_earns_nothing():
    assert scatter((), (2,), np.array([1, 2]), 4).tolist() == [0, 0]


@pytest.mark.parametrize(("rewards", "ends"), [([1.0], (1, 2)), ([1.0], (3,))])
def test_rewards_that_do_not_fit(rewards, ends):
    with pytest.raises(ValueError, match="tokens"):
        scatter(rewards, ends, np.array([1, 2]), 4)
