"""The order of prompts and samples: a function of the items, the seed and the position."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.sampler import EpochSampler, Position


def _prompts(n):
    return [Prompt(f"key{i}", (i,), str(i), str(i), "math") for i in range(n)]


def _sampler(items, seed=1, position=None):
    return EpochSampler(items, seed, position or Position("sft"))


def _keys(items):
    return [item.key for item in items]


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_an_epoch_holds_every_prompt_once(n):
    sampler = _sampler(_prompts(n))
    for epoch in range(3):
        assert Counter(_keys(sampler.take(n))) == Counter(_keys(_prompts(n)))
        assert sampler.position.epoch == epoch


@pytest.mark.parametrize("batch", [1, 3, 20, 64])
def test_what_follows_does_not_depend_on_batches_or_on_the_order_of_the_files(batch):
    whole = _sampler(_prompts(20)).take(192)
    sampler = _sampler(_prompts(20)[::-1])
    assert [prompt for _ in range(192 // batch) for prompt in sampler.take(batch)] == whole[: 192 // batch * batch]


@pytest.mark.parametrize("taken", [0, 1, 7, 19, 20, 21, 57])
def test_a_resumed_run_goes_on(taken):
    whole = _sampler(_prompts(20)).take(100)
    first = _sampler(_prompts(20))
    first.take(taken)
    saved = json.loads(json.dumps(first.position.as_dict()))
    resumed = _sampler(_prompts(20)[::-1], position=Position.read("sft", saved))
    assert resumed.take(30) == whole[taken : taken + 30]


def test_the_place_in_the_data_survives_a_change_of_the_data():
    """Items that come or go move no other, even where the item of the position itself has gone."""
    sampler = _sampler(_prompts(20))
    taken = _keys(sampler.take(8))
    rest = _keys(_sampler(_prompts(20), position=sampler.position).take(12))
    without = [prompt for prompt in _prompts(20) if prompt.key not in (taken[-1], rest[3])]
    assert _keys(_sampler(without, position=sampler.position).take(11)) == rest[:3] + rest[4:]
    more = _keys(_sampler(_prompts(30), position=sampler.position).take(12))
    assert [key for key in more if key in rest] == rest[: len([key for key in more if key in rest])]


def test_the_same_content_twice_comes_twice():
    twice = [*_prompts(5), *_prompts(5)]
    whole = _keys(_sampler(twice).take(20))
    assert Counter(whole[:10]) == dict.fromkeys(_keys(_prompts(5)), 2)
    for place in range(10):
        sampler = _sampler(twice)
        sampler.take(place)
        assert _keys(_sampler(twice, position=sampler.position).take(10)) == whole[place : place + 10]


@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_distinct_items_are_of_one_epoch_and_all_come(count):
    sampler, seen = _sampler(_prompts(7)), set()
    for _ in range(60):
        keys = _keys(sampler.take_distinct(count))
        assert len(set(keys)) == count
        seen |= set(keys)
    assert seen == set(_keys(_prompts(7)))
    with pytest.raises(ValueError, match="8 different items"):
        sampler.take_distinct(8)


def test_epochs_and_seeds_differ():
    sampler = _sampler(_prompts(50))
    orders = [sampler.take(50), sampler.take(50), _sampler(_prompts(50), seed=2).take(50), _prompts(50)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_first_places_are_spread_evenly():
    first = Counter(_sampler(_prompts(5), seed).take(1)[0].key for seed in range(2000))
    assert all(abs(count - 400) < 90 for count in first.values()) and len(first) == 5  # five standard deviations


def test_nothing_to_draw_from():
    with pytest.raises(DataError):
        _sampler([])
