"""Shares of sources: exact counts, whatever the batches, and places that survive."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.data.mixture import Mixture, check_mixture
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.sampler import EpochSampler, Position

WEIGHTS = {"a": 2.0, "b": 1.0, "c": 0.5}


def _items(name: str, n: int = 20) -> list[Prompt]:
    return [Prompt(f"{name}{i:02}", (i,), "", "1", "math", source=name) for i in range(n)]


def _mixture(weights=None, saved=None, sizes=None, seed=1, backwards=False) -> Mixture:
    weights = dict(weights or WEIGHTS)
    sources = {name: _items(name, (sizes or {}).get(name, 20)) for name in weights}
    if backwards:
        weights = dict(reversed(weights.items()))
        sources = {name: sources[name][::-1] for name in reversed(sources)}
    return Mixture(
        sources, weights, lambda items, place: EpochSampler(items, seed, Position.read("s", place.get("position"))),
        json.loads(json.dumps(saved or {})),
    )  # fmt: skip


def _keys(items) -> list[str]:
    return [item.key for item in items]


def _draw(mixture: Mixture, count: int, batch: int = 1) -> list[str]:
    """Keys of so many, in batches that no source is too small for."""
    portions = [min(batch, count - taken) for taken in range(0, count, batch)]
    return [key for portion in portions for key in _keys(mixture.offer(portion, 0, ()))]


def test_a_mixture_of_two_to_one_takes_turns() -> None:
    names = [key[0] for key in _keys(_mixture({"a": 2, "b": 1}).offer(9, 0, ()))]
    assert names == ["a", "b", "a"] * 3


@pytest.mark.parametrize("weights", [WEIGHTS, {"a": 1, "b": 1}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 100, "b": 3}])
def test_each_source_has_its_share_of_any_number_of_draws(weights: dict[str, float]) -> None:
    mixture, had = _mixture(weights), Counter()
    for number in range(1, 400):
        had[mixture.offer(1, 0, ())[0].key[0]] += 1
        for name, weight in weights.items():
            assert -1.5 < had[name] - number * weight / sum(weights.values()) < 1 + 1e-9


def test_each_source_goes_through_epochs_of_its_own() -> None:
    found = _draw(_mixture(), 105, 7)
    for name in WEIGHTS:
        own = [key for key in found if key[0] == name]
        expected = EpochSampler(_items(name), 1, Position("s")).take(len(own))
        assert own == _keys(expected) and len(own) == 30 * WEIGHTS[name]


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_batches_and_the_order_of_sources_do_not_matter(batch: int) -> None:
    assert _draw(_mixture(backwards=True), 84, batch) == _draw(_mixture(), 84)


@pytest.mark.parametrize("taken", [0, 1, 5, 33, 60])
def test_a_resumed_run_goes_on(taken: int) -> None:
    first = _mixture()
    whole = _draw(_mixture(), 100)
    assert _draw(first, taken, 3) == whole[:taken]
    assert _draw(_mixture(saved=first.progress()), 100 - taken, 4) == whole[taken:]


def test_sources_that_come_or_go_leave_the_others_at_their_places() -> None:
    first = _mixture()
    _draw(first, 23)
    saved, after = first.progress(), _draw(first, 105)
    rest = {name: [key for key in after if key[0] == name] for name in WEIGHTS}

    def goes_on(mixture: Mixture, names: str) -> None:
        found = _draw(mixture, 28)
        for name in names:
            own = [key for key in found if key[0] == name]
            assert own and own == rest[name][: len(own)]

    fewer = _mixture({"a": 2.0, "c": 0.5}, saved)
    kept = fewer.progress()
    goes_on(fewer, "ac")
    goes_on(_mixture({**WEIGHTS, "d": 1.0}, saved), "abc")
    goes_on(_mixture(saved=kept), "abc")  # b is back, after it was away
    goes_on(_mixture({"a": 1.0, "b": 4.0, "c": 4.0}, saved), "abc")


def test_under_other_weights_no_old_debt_is_paid() -> None:
    first = _mixture({"a": 1000.0, "b": 999.0})
    _draw(first, 1)
    assert Counter(key[0] for key in _draw(_mixture({"a": 1.0, "b": 1.0}, first.progress()), 8)) == {"a": 4, "b": 4}


def test_a_source_that_is_all_at_work_is_passed_over_and_gets_no_credit_for_it() -> None:
    mixture = _mixture({"a": 1.0, "b": 1.0}, sizes={"a": 3, "b": 20})
    busy = _keys(_items("a", 3))
    assert {key[0] for key in _keys(mixture.offer(10, 0, busy))} == {"b"}
    assert Counter(key[0] for key in _keys(mixture.offer(2, 0, ()))) == {"a": 1, "b": 1}
    assert Counter(key[0] for key in _keys(mixture.offer(8, 0, ()))) == {"a": 3, "b": 5}  # no more than there are
    assert mixture.offer(3, 0, _keys(_items("a", 3) + _items("b"))) == []


def test_shares_that_a_step_cannot_have_are_refused() -> None:
    check_mixture({"a": 11, "b": 6}, [2.0, 1.0], 16)
    with pytest.raises(ConfigError, match="6 of the 16 prompts.*come from b, which has 5"):
        check_mixture({"a": 20, "b": 5}, [2.0, 1.2], 16)
    with pytest.raises(ConfigError, match="b, which has none"):
        check_mixture({"a": 20, "b": 0}, [2.0, 0.1], 16)
    check_mixture({"a": 12, "b": 4}, [0.3, 0.1], 16)  # 0.1 / 0.4 * 16 is a little more than 4 in floats
