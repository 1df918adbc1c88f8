"""Who is noticed to be silent."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist

from megatron_dlm.parallel.watch import HEARD, LEFT, NOTE, Watch

LIMIT = 0.5


@pytest.fixture
def connect() -> Callable[[], dist.Store]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)


class Lost:
    """Remembers who was lost first."""

    def __init__(self) -> None:
        self.event, self.name = threading.Event(), "nobody"

    def __call__(self, name: str | None, seconds: float) -> None:
        assert seconds == LIMIT
        if not self.event.is_set():
            self.name = name
            self.event.set()


def test_silence_is_noticed_and_a_farewell_is_not(connect) -> None:
    """Three others: one beats, one has left, one says nothing any more."""
    store, lost, never = connect(), Lost(), Lost()
    for number, said in ((0, "0"), (1, "0"), (2, LEFT), (3, "0")):
        store.set(f"beat/{number}", said)
    watch = Watch(connect, 0, {1: "alive", 2: "gone", 3: "silent"}, LIMIT, lost)
    alive = Watch(connect, 1, {0: "first", 2: "gone"}, LIMIT, never)
    for one in (watch, alive):
        one.start()
    try:
        assert lost.event.wait(60) and lost.name == "silent"
    finally:
        for one in (watch, alive):
            one.stop(leaving=True)
    assert never.name == "nobody"
    assert store.get("beat/0") == store.get("beat/1") == LEFT.encode()


def test_a_store_that_cannot_be_reached() -> None:
    def nowhere() -> dist.Store:
        raise dist.DistNetworkError("no route")

    lost = Lost()
    watch = Watch(nowhere, 0, {1: "other"}, LIMIT, lost)
    watch.start()
    assert lost.event.wait(60) and lost.name is None
    watch.stop(leaving=True)


def test_a_note_is_kept(connect) -> None:
    """The store may be gone when it is wanted."""
    store = connect()
    for number in (0, 1):
        store.set(f"beat/{number}", "0")
    watch = Watch(connect, 0, {1: "other"}, 100.0, Lost())
    store.set(NOTE, "farewell")
    watch.start()
    store.wait([HEARD])
    watch.stop(leaving=False)
    assert watch.note == b"farewell"
