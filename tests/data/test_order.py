"""The order of indexed data: each sample once per epoch, the same in any portions, and from any place on."""

from __future__ import annotations

import json

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.data.order import KeyedOrder


class Numbers:
    """Samples that are their own numbers."""

    def __init__(self, count: int, identity: str = "a") -> None:
        self.count, self.identity = count, identity

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def order(count: int, seed: int = 1, saved: dict | None = None, identity: str = "a") -> KeyedOrder:
    return KeyedOrder(Numbers(count, identity), seed, "sft", json.loads(json.dumps(saved or {})))


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
def test_an_epoch_holds_every_sample_once(count: int) -> None:
    taken = order(count).take(3 * count)
    epochs = [taken[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 50:
        assert epochs[0] != epochs[1] != epochs[2] != list(range(count))


@pytest.mark.parametrize("batch", [1, 3, 20, 64])
def test_portions_do_not_matter(batch: int) -> None:
    whole, portions = order(20).take(192), order(20)
    assert [one for _ in range(192 // batch) for one in portions.take(batch)] == whole[: 192 // batch * batch]


@pytest.mark.parametrize("taken", [0, 1, 19, 20, 21, 40, 47])
def test_a_saved_place_goes_on_exactly(taken: int) -> None:
    first = order(20)
    first.take(taken)
    assert order(20, saved=first.progress()).take(50) == order(20).take(taken + 50)[taken:]


def test_seed_and_data_make_the_order() -> None:
    orders = [order(100).take(100), order(100, seed=2).take(100), order(100, identity="b").take(100)]
    assert all(one != other for n, one in enumerate(orders) for other in orders[:n])


def test_a_hundred_million_samples_cost_no_more_than_a_hundred() -> None:
    large = order(10**8)
    large.count = 10**8 - 3
    taken = large.take(6)
    assert large.epoch == 1 and large.count == 3 and len(set(taken)) == 6 and max(taken) < 10**8


@pytest.mark.parametrize("now", [{"count": 19}, {"count": 20, "identity": "b"}])
def test_a_place_in_other_data_is_refused(now: dict) -> None:
    with pytest.raises(ConfigError, match="not those of the saved run .20 samples."):
        order(**now, saved=order(20).progress())
    with pytest.raises(ConfigError, match="JSONL files alone"):
        order(20, saved={"position": {"stage": "sft", "epoch": 0, "key": "k"}})
