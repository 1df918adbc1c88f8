"""Advantages over denoising steps, against the sums that the recursions stand for."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.views import trace_views
from megatron_dlm.rl.gae import learned_steps, outcome_rewards, step_gae
from tests.diffusion.oracles import merged_steps, random_trace

STEPS = np.array([1, 1, 2, 3, 3, 3])
REWARDS = np.array([0.0, 0, 0, 1, 1, 1])
VALUES = np.array([0.1, 0.3, 0.4, 0.5, 0.7, 0.6])
ALL = np.ones(6, dtype=bool)

VECTORS = [
    (1.0, 1.0, [0.9, 0.7, 0.6, 0.5, 0.3, 0.4], [1.0] * 6),
    (0.9, 0.5, [0.404, 0.204, 0.32, 0.5, 0.3, 0.4], [0.81, 0.81, 0.9, 1, 1, 1]),
    (1.0, 0.0, [0.3, 0.1, 0.2, 0.5, 0.3, 0.4], [1.0] * 6),
]


@pytest.mark.parametrize(("gamma", "lam", "advantages", "returns"), VECTORS)
def test_known_numbers(gamma: float, lam: float, advantages: list[float], returns: list[float]) -> None:
    found = step_gae(STEPS, REWARDS, VALUES, ALL, gamma, lam)
    np.testing.assert_allclose(found[0], advantages, atol=1e-12)
    np.testing.assert_allclose(found[1], returns, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam", "advantages", "returns"), VECTORS)
def test_only_the_order_of_steps_matters(gamma: float, lam: float, advantages, returns) -> None:
    """Other numbers for the steps, tokens in another order, and tokens between them that are not learned."""
    order = np.array([4, 0, 5, 2, 1, 3])
    steps = np.full(9, 10**6)
    rewards, values, learned = np.full(9, 7.0), np.full(9, -3.0), np.zeros(9, dtype=bool)
    place = np.array([0, 2, 3, 5, 6, 8])
    steps[place], rewards[place], values[place] = STEPS[order] * 17 - 40, REWARDS[order], VALUES[order]
    learned[place] = True
    found = step_gae(steps, rewards, values, learned, gamma, lam)
    np.testing.assert_allclose(found[0][place], np.array(advantages)[order], atol=1e-12)
    np.testing.assert_allclose(found[1][place], np.array(returns)[order], atol=1e-12)
    assert not found[0][~learned].any() and not found[1][~learned].any()


def slow(steps, rewards, values, trainable, gamma, lam) -> tuple[list[float], list[float]]:
    """Sums over all later steps, token by token: no recursion, no arrays."""
    order = sorted({int(step) for step, learned in zip(steps, trainable) if learned})
    tokens = [[j for j in range(len(steps)) if trainable[j] and steps[j] == step] for step in order]
    mean = lambda of, t: sum(of[j] for j in tokens[t]) / len(tokens[t]) if t < len(order) else 0.0
    advantages, returns = [0.0] * len(steps), [0.0] * len(steps)
    for t, members in enumerate(tokens):
        later = range(t + 1, len(order))
        surprise = {s: mean(rewards, s) + gamma * mean(values, s + 1) - mean(values, s) for s in later}
        for j in members:
            returns[j] = rewards[j] + sum(gamma ** (s - t) * mean(rewards, s) for s in later)
            advantages[j] = rewards[j] + gamma * mean(values, t + 1) - values[j]
            advantages[j] += sum((gamma * lam) ** (s - t) * surprise[s] for s in later)
    return advantages, returns


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.9, 0.0])
def test_random_traces(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(3)
    for n in range(30):
        trace = random_trace(int(rng.integers(1, 9)), int(rng.integers(1, 30)), [1, 4, 8][n % 3], rng)
        steps = learned_steps(trace, [Grid(4), Grid(None), Grid(8)][n % 3], 1 + n % 4)
        rewards, values = rng.normal(size=(2, len(steps)))
        trainable = rng.random(len(steps)) < [1.0, 0.6][n % 2]
        found = step_gae(steps, rewards, values, trainable, gamma, lam)
        for mine, expected in zip(found, slow(steps, rewards, values, trainable, gamma, lam)):
            np.testing.assert_allclose(mine, expected, atol=1e-12)


def test_an_undiscounted_outcome_is_everybodys_return() -> None:
    """With gamma = lambda = 1, whatever the values are."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        trace = random_trace(3, int(rng.integers(1, 25)), 4, rng)
        steps, trainable = learned_steps(trace, Grid(4)), rng.random(len(trace.response_ids)) < 0.7
        trainable[int(rng.integers(len(trainable)))] = True
        values = rng.normal(size=len(steps))
        rewards = outcome_rewards(steps, trainable, -1.3)
        advantages, returns = step_gae(steps, rewards, values, trainable, 1.0, 1.0)
        np.testing.assert_allclose(returns, np.where(trainable, -1.3, 0.0), atol=1e-12)
        np.testing.assert_allclose(advantages, np.where(trainable, -1.3 - values, 0.0), atol=1e-12)


def test_edges() -> None:
    nothing = step_gae(STEPS, REWARDS, VALUES, ~ALL, 0.9, 0.9)
    assert not nothing[0].any() and not nothing[1].any() and len(nothing[0]) == 6
    empty = np.zeros(0)
    assert [len(part) for part in step_gae(empty, empty, empty, empty.astype(bool), 0.9, 0.9)] == [0, 0]
    one = step_gae(np.full(6, 4), REWARDS, VALUES, ALL, 0.3, 0.3)  # the future is nothing
    np.testing.assert_allclose(one[0], REWARDS - VALUES)
    np.testing.assert_allclose(one[1], REWARDS)


def test_the_outcome_falls_to_the_last_step_that_is_learned() -> None:
    trainable = np.array([True, True, True, False, False, False])
    assert outcome_rewards(STEPS, ALL, 0.5).tolist() == [0, 0, 0, 0.5, 0.5, 0.5]
    assert outcome_rewards(STEPS, trainable, -2.0).tolist() == [0, 0, -2.0, 0, 0, 0]
    assert outcome_rewards(np.array([3, 1, 3, 2]), np.array([False, True, True, True]), 1.0).tolist() == [0, 0, 1, 0]
    assert outcome_rewards(STEPS, ~ALL, 1.0).tolist() == [0] * 6


@pytest.mark.parametrize("block", [4, 8, None])
@pytest.mark.parametrize("shrinkage", [1, 2, 3, 100])
def test_steps_are_those_of_the_views(block: int | None, shrinkage: int) -> None:
    """Two tokens have one step exactly if one view predicts both, and steps grow from block to block."""
    rng = np.random.default_rng(1)
    for n in range(8):
        trace = random_trace(1 + n, 5 + 2 * n, block or 4, rng)
        grid, prompt = Grid(block), len(trace.prompt_ids)
        steps = learned_steps(trace, grid, shrinkage)
        views = trace_views(trace, grid, shrinkage)
        view_of = np.full(len(steps), -1)
        for number, (position, target) in enumerate(zip(views.position, views.target)):
            view_of[position[target] - prompt] = number
        assert view_of.min() >= 0
        assert np.array_equal(steps[:, None] == steps[None, :], view_of[:, None] == view_of[None, :])
        assert np.array_equal(steps[:, None] < steps[None, :], view_of[:, None] < view_of[None, :])
        if block is None:
            assert steps.tolist() == merged_steps(trace.all_steps.tolist(), shrinkage)[: len(steps)]
