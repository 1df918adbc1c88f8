from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.diffusion.sampling import Draws, draw

ALMOST_ONE = 1 - 2.0**-53


def log_policy(probabilities: list[float] | np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(np.asarray(probabilities, dtype=np.float64)).log().to(dtype)


def run(policy: Tensor, uniform: Tensor, greedy: bool = False, top_k: int = 0, top_p: float = 1.0) -> Draws:
    """Every uniform number against one distribution [V]."""
    n = len(uniform)
    return draw(
        policy.expand(n, -1),
        uniform,
        torch.full((n,), greedy),
        torch.full((n,), top_k),
        torch.full((n,), top_p, dtype=torch.float64),
    )


def naive_filter(probabilities: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """top-k, then the smallest set that holds top_p of what is left; likelier first, lower id first among equals."""
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    if top_k:
        order = order[:top_k]
    total = sum(probabilities[token] for token in order)
    kept, held = [], 0.0
    for token in order:
        if kept and held >= top_p:
            break
        kept.append(token)
        held += probabilities[token] / total
    shaped = np.zeros(len(probabilities))
    shaped[kept] = probabilities[kept] / sum(probabilities[token] for token in kept)
    return shaped


def sweep(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_the_uniform_number_walks_through_the_tokens_in_order() -> None:
    policy = log_policy([0.25, 0.5, 0.25])
    drawn = run(policy, torch.tensor([0.0, 0.2, 0.3, 0.7, 0.8, ALMOST_ONE], dtype=torch.float64))
    assert drawn.token.tolist() == [0, 0, 1, 1, 2, 2]
    assert drawn.token.dtype == torch.int64


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_are_the_probabilities(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(30, 0.3))
    probabilities[rng.integers(0, 30, 5)] = 0
    probabilities /= probabilities.sum()
    n = 20000
    counts = np.bincount(run(log_policy(probabilities, dtype), sweep(n)).token.numpy(), minlength=30)
    assert (abs(counts - probabilities * n) <= 1.02).all()
    assert (counts[probabilities == 0] == 0).all()


@pytest.mark.parametrize("seed", range(30))
def test_filters_against_the_naive_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    v, n = int(rng.integers(2, 25)), 4000
    weights = rng.integers(0, 5, v) if seed % 2 else rng.random(v)  # with many equals, and banned tokens; or none
    weights = weights.astype(np.float64)
    weights[rng.integers(0, v)] = 3.0
    probabilities = weights / weights.sum()
    for top_k, top_p in (
        (0, float(rng.random())),
        (int(rng.integers(1, v + 3)), 1.0),
        (int(rng.integers(1, v + 3)), float(rng.random())),
    ):
        shaped = naive_filter(probabilities, top_k, top_p)
        drawn = run(log_policy(probabilities), sweep(n), top_k=top_k, top_p=top_p)
        counts = np.bincount(drawn.token.numpy(), minlength=v)
        assert (abs(counts - shaped * n) <= 1.01).all(), (probabilities, top_k, top_p)
        assert (counts[shaped == 0] == 0).all()
        assert np.allclose(drawn.sampling_logprob.numpy(), np.log(shaped[drawn.token.numpy()]), atol=1e-12)
        assert np.allclose(drawn.logprob.numpy(), np.log(probabilities[drawn.token.numpy()]), atol=1e-12)
        assert np.allclose(drawn.confidence.numpy(), shaped[drawn.token.numpy()], atol=1e-12)


def test_equals_at_the_edge_of_a_filter_go_to_the_lowest_id() -> None:
    policy = log_policy([0.125] * 8)
    assert set(run(policy, sweep(100), top_k=3).token.tolist()) == {0, 1, 2}
    assert set(run(policy, sweep(100), top_p=0.3).token.tolist()) == {0, 1, 2}
    policy = log_policy(np.full(2000, 1 / 2000), torch.float32)
    assert set(run(policy, sweep(100), top_k=1).token.tolist()) == {0}


def test_top_p_stops_at_the_token_that_reaches_it() -> None:
    """At the exact boundary the set is the smallest; powers of two, so that nothing is rounded."""
    policy = log_policy([0.5, 0.25, 0.25])
    for top_p, kept in ((0.25, {0}), (0.5, {0}), (0.75, {0, 1})):
        assert set(run(policy, sweep(100), top_p=top_p).token.tolist()) == kept


def test_top_p_zero_or_top_k_one_leave_the_most_likely() -> None:
    policy = log_policy([0.2, 0.5, 0.3])
    for options in ({"top_p": 0.0}, {"top_k": 1}, {"top_k": 2, "top_p": 0.1}):
        drawn = run(policy, sweep(50), **options)
        assert set(drawn.token.tolist()) == {1}
        assert drawn.sampling_logprob.abs().max() == 0 and (drawn.confidence == 1).all()
        assert torch.allclose(drawn.logprob, torch.tensor(0.5).double().log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.999}])
def test_a_banned_token_is_never_drawn(options: dict, dtype: torch.dtype) -> None:
    edge = torch.tensor([0.0, 5e-324, 2.0**-53, 0.5, 1 - 1e-9, 1 - 2.0**-52, ALMOST_ONE], dtype=torch.float64)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        logits = torch.from_numpy(rng.normal(0, 4, 64)).to(dtype)
        banned = torch.from_numpy(rng.random(64) < 0.4)
        banned[:3] = banned[-3:] = True
        banned[10] = False
        drawn = run(logits.masked_fill(banned, float("-inf")).log_softmax(-1), edge, **options)
        assert not banned[drawn.token].any()
        assert torch.isfinite(drawn.logprob).all() and torch.isfinite(drawn.sampling_logprob).all()


def test_a_policy_that_allows_one_token_draws_it() -> None:
    for only in (0, 3, 7):
        policy = torch.full((8,), float("-inf"))
        policy[only] = 0.0
        for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"greedy": True}):
            assert set(
                run(policy, torch.tensor([0.0, 0.5, ALMOST_ONE], dtype=torch.float64), **options).token.tolist()
            ) == {only}


def test_the_likelihood_of_an_unfiltered_draw_is_the_policy() -> None:
    policy = torch.randn(100, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    drawn = run(policy, sweep(500))
    assert drawn.logprob.equal(policy[drawn.token]) and drawn.sampling_logprob.equal(drawn.logprob)
    assert drawn.confidence.equal(drawn.logprob.exp())


def test_greedy_takes_the_lowest_of_the_most_likely() -> None:
    drawn = run(log_policy([0.1, 0.35, 0.35, 0.2]), sweep(20), greedy=True)
    assert set(drawn.token.tolist()) == {1}
    assert torch.allclose(drawn.logprob, torch.tensor(0.35).double().log())
    assert (drawn.sampling_logprob == 0).all()
    assert torch.allclose(drawn.confidence, torch.tensor(0.35).double(), atol=1e-7)
    flat = torch.full((4000,), -math.log(4000))
    flat[:17] = float("-inf")
    assert set(run(flat, sweep(3), greedy=True).token.tolist()) == {17}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_does_not_depend_on_the_requests_around_it(dtype: torch.dtype) -> None:
    """Bit by bit: each request keeps its own filters, and nobody else's."""
    generator = torch.Generator().manual_seed(0)
    policy = (3 * torch.randn(64, 500, generator=generator, dtype=torch.float64)).to(dtype).log_softmax(-1)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    kind = torch.arange(64) % 4
    greedy, top_k = kind == 1, torch.where(kind == 2, 7, 0)
    top_p = torch.where(kind == 3, 0.8, 1.0)
    together = draw(policy, uniform, greedy, top_k, top_p)
    for i in range(64):
        alone = draw(policy[i : i + 1], uniform[i : i + 1], greedy[i : i + 1], top_k[i : i + 1], top_p[i : i + 1])
        for name in ("token", "logprob", "sampling_logprob", "confidence"):
            assert getattr(alone, name)[0] == getattr(together, name)[i], (name, int(kind[i]))


def test_top_p_of_one_keeps_the_whole_tail() -> None:
    """Rounding must not cut what 'keep all' keeps: 4000 unlikely tokens, and one that takes nearly everything."""
    logits = torch.full((4001,), -16.5)
    logits[0] = 0.3
    for seed in range(20):
        noise = torch.randn(4001, generator=torch.Generator().manual_seed(seed))
        policy = (logits + noise).log_softmax(-1)
        drawn = run(policy, torch.tensor([ALMOST_ONE], dtype=torch.float64), top_k=4001)
        assert drawn.token.item() == 4000
