from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.diffusion import filters, sampling
from megatron_dlm.diffusion.sampling import Confidence, DrawRules, Draws, draw

ALMOST_ONE = 1 - 2.0**-53


def log_policy(probabilities: list[float] | np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(np.asarray(probabilities, dtype=np.float64)).log().to(dtype)


def rules_of(
    n: int,
    greedy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    confidence: int = Confidence.SAMPLED,
) -> DrawRules:
    return DrawRules(
        torch.full((n,), greedy),
        torch.full((n,), top_k),
        torch.full((n,), top_p, dtype=torch.float64),
        torch.full((n,), temperature, dtype=torch.float64),
        torch.full((n,), int(confidence)),
    )


def run(scores: Tensor, uniform: Tensor, **options) -> Draws:
    """Every uniform number against one row of scores [V]."""
    return draw(scores.expand(len(uniform), -1), uniform, rules_of(len(uniform), **options))


@dataclass(frozen=True)
class Slow:
    """One draw in plain Python."""

    token: int
    logprob: float
    sampling_logprob: float
    confidence: float
    clearance: float  # distance of the uniform number from the next boundary of the cumulative distribution


def slow_draw(scores: list[float], uniform: float, rules: DrawRules, row: int) -> Slow:
    """What `draw` promises, for one row, with loops over the vocabulary."""
    greedy, top_k, top_p, temperature, confidence = (
        getattr(rules, field.name)[row].item() for field in dataclasses.fields(DrawRules)
    )
    policy = softmax(scores)
    shaped = policy if greedy else naive_filter(np.array(policy), top_k, top_p).tolist()
    passed, clearance, token = 0.0, 1.0, None
    for candidate, probability in enumerate(shaped):
        passed += probability
        clearance = min(clearance, abs(passed - uniform))
        if token is None and uniform < passed:
            token = candidate
    if greedy:
        token, clearance = max(range(len(scores)), key=lambda one: (scores[one], -one)), 1.0
    ranked = sorted(shaped, reverse=True)
    sure = {
        Confidence.SAMPLED: shaped[token],
        Confidence.UNTEMPERED: softmax([score * temperature for score in scores])[token],
        Confidence.MARGIN: ranked[0] - (ranked[1] if len(ranked) > 1 else 0.0),
        Confidence.ENTROPY: sum(one * math.log(one) for one in shaped if one > 0),
    }[confidence]
    return Slow(token, math.log(policy[token]), 0.0 if greedy else math.log(shaped[token]), sure, clearance)


def softmax(scores: list[float]) -> list[float]:
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / math.fsum(weights) for weight in weights]


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
    for size in (2000, 5000):  # sorted, or not
        for best in (0, 7, size - 300):
            scores = torch.zeros(size)
            scores[:best] = -1.0
            assert set(run(scores, sweep(100), top_k=1).token.tolist()) == {best}
            assert set(run(scores, sweep(100), top_k=3).token.tolist()) == {best, best + 1, best + 2}
            assert set(run(scores, sweep(100), top_p=1e-9).token.tolist()) == {best}


def test_all_are_kept_where_nothing_is_cut() -> None:
    """Also those whose probability is lost in the rounding of a sum."""
    scores = torch.full((1, 90), -45.0, dtype=torch.float64)
    scores[0, 4] = 0.0
    for top_k in (90, 91):
        total, one = scores.exp().sum(-1), torch.ones(1, dtype=torch.float64)
        kept = filters.keep(scores, torch.zeros(1, dtype=torch.float64), total, torch.tensor([top_k]), one)
        assert kept.ids.tolist() == [list(range(90))] and (kept.weight > 0).all()


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
    assert torch.allclose(drawn.logprob, policy[drawn.token].double(), atol=1e-6)
    assert drawn.sampling_logprob.equal(drawn.logprob) and drawn.confidence.equal(drawn.logprob.exp())


def test_greedy_takes_the_lowest_of_the_most_likely() -> None:
    drawn = run(log_policy([0.1, 0.35, 0.35, 0.2]), sweep(20), greedy=True)
    assert set(drawn.token.tolist()) == {1}
    assert torch.allclose(drawn.logprob, torch.tensor(0.35).double().log())
    assert (drawn.sampling_logprob == 0).all()
    assert torch.allclose(drawn.confidence, torch.tensor(0.35).double(), atol=1e-7)
    flat = torch.full((4000,), -math.log(4000))
    flat[:17] = float("-inf")
    assert set(run(flat, sweep(3), greedy=True).token.tolist()) == {17}


def random_rules(n: int, generator: torch.Generator, v: int) -> DrawRules:
    """Every kind of row in one batch."""
    kind = torch.randint(0, 5, (n,), generator=generator)
    k = torch.randint(1, v + 3, (n,), generator=generator)
    p = torch.rand(n, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([1.0, 0.5, 1.7], dtype=torch.float64)[torch.randint(0, 3, (n,), generator=generator)]
    confidence = torch.randint(0, len(Confidence), (n,), generator=generator)
    return DrawRules(
        greedy=kind == 0,
        top_k=torch.where((kind == 2) | (kind == 4), k, 0),
        top_p=torch.where(kind >= 3, p, 1.0),
        temperature=torch.where(kind == 0, 1.0, temperature),
        confidence=confidence,
    )


SIZES = [1, 2, 15, 16, 17, 63, 255, 256, 290, 600]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("v", SIZES)
def test_against_loops_over_the_vocabulary(v: int, dtype: torch.dtype, monkeypatch) -> None:
    """With banned tokens and equals; vocabularies smaller and larger than a chunk and than the filters' first look."""
    monkeypatch.setattr(sampling, "_SLAB", 4 * v)  # several slabs, the last one shorter
    monkeypatch.setattr(filters, "_CANDIDATES", 20)
    monkeypatch.setattr(filters, "_SMALL", 60)
    monkeypatch.setattr(filters, "_SORTED_AT_ONCE", 7 * v)
    generator, n = torch.Generator().manual_seed(v), 50
    scores = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    scores[::3] = (scores[::3] * 2).round() / 2  # many equals
    scores[1::3] -= 3 * torch.rand(v, generator=generator, dtype=torch.float64) * torch.arange(v) / v
    scores = scores.to(dtype).masked_fill(torch.rand(n, v, generator=generator) < 0.2, float("-inf"))
    scores[:, v // 2] = torch.randn(n, generator=generator).to(dtype)  # at least one is allowed
    rules, uniform = random_rules(n, generator, v), torch.rand(n, generator=generator, dtype=torch.float64)
    found, near = draw(scores, uniform, rules), 1e-6 if dtype == torch.float32 else 1e-13
    clear = 0
    for row in range(n):
        slow = slow_draw(scores[row].tolist(), float(uniform[row]), rules, row)
        if slow.clearance < near:
            continue
        clear += 1
        assert found.token[row] == slow.token, row
        for name in ("logprob", "sampling_logprob", "confidence"):
            assert getattr(found, name)[row] == pytest.approx(getattr(slow, name), rel=near, abs=10 * near), (name, row)
    assert clear > 0.9 * n


@pytest.mark.parametrize("v", [17, 500, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_does_not_depend_on_the_requests_around_it(dtype: torch.dtype, v: int) -> None:
    """Bit by bit: each request keeps its own filters, and nobody else's."""
    generator, n = torch.Generator().manual_seed(0), 48
    scores = (3 * torch.randn(n, v, generator=generator, dtype=torch.float64)).to(dtype)
    scores[torch.rand(n, v, generator=generator) < 0.1] = float("-inf")
    scores[:, 3] = 0.0
    scores[::5] = (2 * scores[::5]).round() / 2  # equals
    rules, uniform = random_rules(n, generator, v), torch.rand(n, generator=generator, dtype=torch.float64)
    together = draw(scores, uniform, rules)
    for start, stop in [*((i, i + 1) for i in range(n)), (0, 7), (7, 30), (30, n)]:
        own = DrawRules(*(getattr(rules, field.name)[start:stop] for field in dataclasses.fields(DrawRules)))
        alone = draw(scores[start:stop], uniform[start:stop], own)
        for field in dataclasses.fields(Draws):
            assert torch.equal(getattr(alone, field.name), getattr(together, field.name)[start:stop]), (field, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"greedy": True}])
@pytest.mark.parametrize("offset", [0.0, 3e4, -3e4])
def test_extreme_scores(offset: float, options: dict, dtype: torch.dtype) -> None:
    """A constant changes nothing, and what is far below the best is never drawn; nothing overflows."""
    scores = torch.full((300,), -2e4, dtype=dtype)
    scores[[40, 260]] = torch.tensor([0.0, 1.0], dtype=dtype)
    scores[7] = float("-inf")
    edge = torch.tensor([0.0, 0.2, 0.3, 0.9, ALMOST_ONE], dtype=torch.float64)
    low = 1 / (1 + math.e)
    expected = [40, 40, 260, 260, 260]
    if options.get("greedy"):
        expected = [260] * 5
    for confidence in Confidence:
        drawn = run(scores + offset, edge, confidence=confidence, **options)
        assert drawn.token.tolist() == expected
        wanted = [math.log(low if token == 40 else 1 - low) for token in expected]
        assert drawn.logprob.tolist() == pytest.approx(wanted, abs=1e-6)
        assert torch.isfinite(drawn.confidence).all() and torch.isfinite(drawn.sampling_logprob).all()


@pytest.mark.parametrize("v", [1, 16, 47, 300])
def test_the_ends_of_the_uniform_numbers_are_the_first_and_last_tokens(v: int) -> None:
    scores = torch.zeros(v + 4)
    scores[:2] = scores[-2:] = float("-inf")
    drawn = run(scores, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64))
    assert drawn.token.tolist() == [2, v + 1]


def test_every_boundary_of_equal_tokens_is_met_exactly() -> None:
    """Powers of two: nothing is rounded, so also the boundaries between chunks are where they should be."""
    v = 1024
    uniform = torch.arange(v, dtype=torch.float64) / v
    assert run(torch.zeros(v), uniform).token.tolist() == list(range(v))
    assert run(torch.zeros(v), uniform + 2.0**-12).token.tolist() == list(range(v))


def test_a_certain_distribution_is_certain() -> None:
    """Several positions are then equally sure, and the lowest goes first."""
    scores = torch.randn(400, generator=torch.Generator().manual_seed(0))
    for confidence, expected in ((Confidence.SAMPLED, 1.0), (Confidence.MARGIN, 1.0), (Confidence.ENTROPY, 0.0)):
        assert (run(scores, sweep(9), top_k=1, confidence=confidence).confidence == expected).all()
        only = torch.full((400,), float("-inf"))
        only[9] = 3.0
        assert (run(only, sweep(9), confidence=confidence).confidence == expected).all()


def test_without_temperature_the_confidence_is_the_models() -> None:
    logits = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
    drawn = run(logits / 0.25, sweep(400), temperature=0.25, top_k=2, confidence=Confidence.UNTEMPERED)
    assert drawn.confidence.tolist() == pytest.approx(logits.softmax(-1)[drawn.token].tolist(), abs=1e-12)
    assert set(drawn.token.tolist()) == {0, 1}


def test_top_p_of_one_keeps_the_whole_tail() -> None:
    """Rounding must not cut what 'keep all' keeps: 4000 unlikely tokens, and one that takes nearly everything."""
    logits = torch.full((4001,), -16.5)
    logits[0] = 0.3
    for seed in range(20):
        noise = torch.randn(4001, generator=torch.Generator().manual_seed(seed))
        policy = (logits + noise).log_softmax(-1)
        drawn = run(policy, torch.tensor([ALMOST_ONE], dtype=torch.float64), top_k=4001)
        assert drawn.token.item() == 4000
