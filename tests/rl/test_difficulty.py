"""Draws by pass rate, held against the probabilities of drawing by weight without replacement."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.rl.difficulty import DifficultySampler, open_sampler, weights_of
from megatron_dlm.rl.pass_rates import PassRates

RATES = {"p0": 0.0, "p1": 0.125, "p2": 0.5, "p3": 0.75, "p4": 1.0}
FLOOR = 0.2


def _prompts(keys) -> list[Prompt]:
    return [Prompt(key, (1,), "", "1", "math", source=key[0]) for key in keys]


def _sampler(keys=RATES, rates=RATES, floor=FLOOR, seed=1) -> DifficultySampler:
    known = PassRates(0.5)
    if rates:
        known.visit(rates)
    return DifficultySampler(_prompts(keys), seed, known, floor)


def _keys(prompts) -> list[str]:
    return [prompt.key for prompt in prompts]


def test_the_formula() -> None:
    np.testing.assert_allclose(weights_of(np.array([0, 0.25, 0.5, 1]), 0.1), [0.1, 0.85, 1.1, 0.1])


def test_prompts_are_drawn_by_their_weights_without_replacement() -> None:
    weights = {key: FLOOR + 4 * rate * (1 - rate) for key, rate in RATES.items()}
    whole, draws, sampler = sum(weights.values()), 8_000, _sampler()
    found = Counter(tuple(_keys(sampler.offer(2, step, ()))) for step in range(draws))
    assert sum(found.values()) == draws
    for pair in permutations(RATES, 2):
        first, second = (weights[key] for key in pair)
        chance = first / whole * second / (whole - first)
        assert abs(found[pair] / draws - chance) < 4.5 * np.sqrt(chance * (1 - chance) / draws)


@pytest.mark.parametrize("floor", [0.0, FLOOR])
def test_an_unseen_prompt_counts_as_one_of_a_share_of_one_half(floor: float) -> None:
    sampler, draws = _sampler(keys=[*RATES, "new"], floor=floor), 8_000
    weights = {key: floor + 4 * rate * (1 - rate) for key, rate in (RATES | {"new": 0.5}).items()}
    found = Counter(_keys(sampler.offer(1, step, ()))[0] for step in range(draws))
    for key, weight in weights.items():
        chance = weight / sum(weights.values())
        assert abs(found[key] / draws - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / draws), key


def test_what_is_known_matters_long_before_all_was_seen() -> None:
    """A thousand prompts of which one in ten can be solved half of the time and the rest never."""
    keys = [f"p{n}" for n in range(1_000)]
    rate = {key: 0.5 if n % 10 == 0 else 0.0 for n, key in enumerate(keys)}
    rates = PassRates(0.7)
    sampler = DifficultySampler(_prompts(keys), 1, rates, 0.02)
    for step in range(16):
        rates.visit({key: rate[key] for key in _keys(sampler.offer(40, step, ()))})
    again = np.maximum(rates.visits[rates.rows(keys)] - 1, 0)
    assert len(rates) < 640 and again[::10].sum() > 2 * again[np.arange(1_000) % 10 > 0].sum() > 0


def test_what_has_no_weight_comes_last() -> None:
    sampler = _sampler(floor=0.0)
    firsts = Counter()
    for step in range(200):
        found = _keys(sampler.offer(5, step, ()))
        assert set(found[3:]) == {"p0", "p4"} and len(set(found)) == 5
        firsts[found[3]] += 1
    assert min(firsts.values()) > 60


def test_neither_lists_nor_portions_nor_others_matter() -> None:
    for step in range(30):
        order = _keys(_sampler().offer(5, step, ()))
        backwards = dict(reversed(RATES.items()))
        assert _keys(_sampler(keys=backwards, rates=backwards).offer(5, step, ())) == order
        had = _keys(_sampler().offer(2, step, ()))
        assert had + _keys(_sampler().offer(9, step, had)) == order
        fewer = _keys(_sampler(keys=["p1", "p2", "p4"]).offer(3, step, ["elsewhere"]))
        assert fewer == [key for key in order if key in fewer]
    assert len({tuple(_keys(_sampler(seed=seed).offer(5, 0, ()))) for seed in range(20)}) > 5


def test_rates_that_change_change_the_draws() -> None:
    rates = PassRates(0.0)
    sampler = DifficultySampler(_prompts(["a", "b"]), 1, rates, 0.0)
    rates.visit({"a": 0.0, "b": 0.5})
    assert all(_keys(sampler.offer(1, step, ())) == ["b"] for step in range(20))
    rates.visit({"a": 0.5, "b": 1.0})
    assert all(_keys(sampler.offer(1, step, ())) == ["a"] for step in range(20, 40))


def test_a_mixture_draws_by_difficulty_within_its_sources() -> None:
    rates = PassRates(0.0)
    prompts = _prompts([f"{name}{number}" for name in "xy" for number in range(6)])
    rates.visit({prompt.key: 0.5 if prompt.key[1] in "012" else 1.0 for prompt in prompts})
    config = CurriculumConfig(prompt_weights=[2.0, 1.0], prompt_sampling="difficulty", difficulty_floor=0.0)
    sampler = open_sampler(prompts, "tracerl", 1, config, rates, {})
    for step in range(10):
        found = _keys(sampler.offer(3, step, ()))
        assert sorted(key[0] for key in found) == ["x", "x", "y"] and all(key[1] in "012" for key in found)


@pytest.mark.parametrize("weights", [[], [1.0, 3.0]])
def test_many_prompts(weights: list[float]) -> None:
    keys = [f"{'ab'[n % 2]}{n}" for n in range(30_000)]
    rates = PassRates(0.5)
    rates.visit({key: n % 9 / 8 for n, key in enumerate(keys)})
    config = CurriculumConfig(prompt_weights=weights, prompt_sampling="difficulty", difficulty_floor=0.1)
    sampler = open_sampler(_prompts(keys), "tracerl", 1, config, rates, {})
    found = _keys(sampler.offer(9_000, 0, ()))
    assert len(set(found)) == 9_000
    solved = np.mean([int(key[1:]) % 9 in (0, 8) for key in found])
    assert 0.02 < solved < 0.08  # of 22% of the prompts, with a weight of 0.1 beside up to 1.1
