"""The order of prompts and samples: a function of the items, the seed and the position."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.sampler import EpochSampler


def _prompts(n):
    return [Prompt(f"key{i}", (i,), str(i), str(i), "math") for i in range(n)]


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_an_epoch_holds_every_prompt_once(n):
    sampler = EpochSampler(_prompts(n), seed=1)
    for epoch in range(3):
        assert Counter(p.key for p in sampler.take(epoch * n, n)) == Counter(p.key for p in _prompts(n))
        assert sampler.take(epoch * n, n) == sampler.epoch_order(epoch)


@pytest.mark.parametrize("batch", [1, 3, 20, 64])
def test_positions_do_not_depend_on_batches_or_on_what_was_taken(batch):
    whole = EpochSampler(_prompts(20), seed=1).take(0, 100)
    sampler = EpochSampler(_prompts(20)[::-1], seed=1)  # nor on the order of the files
    pieces = {start: sampler.take(start, min(batch, 100 - start)) for start in reversed(range(0, 100, batch))}
    assert [prompt for start in sorted(pieces) for prompt in pieces[start]] == whole
    assert EpochSampler(_prompts(20), seed=1).take(57, 30) == whole[57:87]  # a resumed run


def test_epochs_and_seeds_differ():
    sampler = EpochSampler(_prompts(50), seed=1)
    orders = [
        sampler.epoch_order(0),
        sampler.epoch_order(1),
        EpochSampler(_prompts(50), seed=2).epoch_order(0),
        _prompts(50),
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_first_places_are_spread_evenly():
    first = Counter(EpochSampler(_prompts(5), seed).take(0, 1)[0].key for seed in range(2000))
    assert all(abs(count - 400) < 90 for count in first.values()) and len(first) == 5  # five standard deviations


def test_nothing_to_draw_from():
    with pytest.raises(DataError):
        EpochSampler([], seed=0)
