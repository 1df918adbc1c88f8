"""Tickets, taken by several replicas in one process, in any order in which they may ask."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from megatron_dlm.rollout import queue as module
from megatron_dlm.rollout.queue import Queue


class Shared:
    """Counters of several replicas in one process."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.gone: list[str] = []

    def add(self, counter: str, amount: int) -> int:
        self.sums[counter] += amount
        return self.sums[counter]

    def read(self, counter: str) -> int:
        return self.sums[counter]

    def leave(self, used) -> None:
        self.gone = list(used)


@pytest.fixture
def queues(monkeypatch):
    def make(size: int, replicas: int, enough: int | None = None) -> list[Queue]:
        shared = Shared()
        monkeypatch.setattr(module, "Counters", lambda name, members: shared)
        return [Queue("test", size, replica, replicas, None, enough) for replica in range(replicas)]

    return make


@pytest.mark.parametrize("size", [0, 1, 3, 7, 40])
@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_each_ticket_is_taken_once_and_none_is_left(queues, size: int, replicas: int, seed: int) -> None:
    draw, taken = random.Random(seed), []
    made = queues(size, replicas)
    for _ in range(60 * replicas):
        one = draw.choice(made)
        if one.wants_to_know(draw.randrange(0, 2), False):
            taken += one.ask(draw.randrange(0, 4))
    for _ in range(2):  # whoever has not begun begins, and the others see it
        for one in made:
            while one.wants_to_know(1, False) and (found := one.ask(3)):
                taken += found
    assert sorted(taken) == list(range(size))
    assert all(one.exhausted and not one.wants_to_know(1, True) for one in made)


def test_replicas_with_room_for_their_lanes_take_just_these(queues) -> None:
    """However long one of them is in starting."""
    early, late = queues(7, 2)
    assert list(early.ask(9)) == [0, 2, 4, 6]
    assert list(early.ask(9)) == [] and not early.exhausted  # the other lane is not open yet
    assert list(late.ask(3)) == [1, 3, 5]
    assert list(early.ask(1)) == [] and early.exhausted


def test_a_free_replica_takes_half_of_what_others_have_left(queues) -> None:
    free, busy = queues(20, 2)
    assert list(free.ask(10)) == list(range(0, 20, 2))
    assert list(busy.ask(2)) == [1, 3]
    assert list(free.ask(8)) == [5, 7, 9, 11]  # 4 of 8
    assert list(busy.ask(2)) == [13, 15]
    assert list(free.ask(8)) == [17]
    assert list(free.ask(8)) == [19]
    assert list(busy.ask(2)) == [] and busy.exhausted


def test_whoever_has_no_room_opens_its_lane(queues) -> None:
    full, free = queues(4, 2)
    assert full.wants_to_know(-3, False) and list(full.ask(-3)) == []
    assert not full.wants_to_know(-3, True) and not full.exhausted
    assert list(free.ask(2)) == [1, 3] and list(free.ask(2)) == [0] and list(free.ask(2)) == [2]


def test_all_stop_when_enough_is_finished(queues) -> None:
    one, other = queues(9, 2, enough=2)
    assert list(one.ask(2)) == [0, 2] and list(other.ask(2)) == [1, 3]
    assert one.finished() == 0 and not one.wants_to_know(0, False) and one.wants_to_know(0, True)
    assert list(one.ask(0)) == [] and not one.stopped
    assert other.finished() == 1 and one.finished() == 2
    for queue in (one, other):
        assert list(queue.ask(5)) == [] and queue.stopped and not queue.wants_to_know(5, True)


def test_what_was_used_is_named_at_the_end(queues) -> None:
    one, _ = queues(9, 2)
    one.ask(1)
    one.finished()
    one.leave()
    assert set(one.counters.sums) <= set(one.counters.gone)
