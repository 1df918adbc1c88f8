"""Who has fallen silent: hosts of a job watch each other.

One process of each host, in a thread, counts up a number of its own in the job's store and looks at those of the
others. Clocks are not compared: whoever looks measures by his own clock how long a number has stood still. A host that
ends in peace says so first.

A second thread judges, because one that asks a store behind a dead link may wait for ever. Whoever has himself been
stopped for a while (a suspended machine, a debugger) has no judgement until he has looked again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

NOTE, HEARD = "note", "heard"  # keys: why a process leaves; how many have read that
LEFT = "left"
PERIOD = 5.0  # seconds between two looks, at most
_STOP_SECONDS = 2.0


class Watch:
    """Watches until it is stopped, or has lost somebody.

    Args:
        connect: makes a connection to the store for the thread that looks.
        own: number of this host. others: number -> name of the other ones. Each host has set key beat/NUMBER.
        limit: seconds of silence.
        lose: called with the name of the host that is lost, None for the store's, and the limit.

    Attributes:
        note: what a process that left wrote down, kept here because the store may end with that process.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        own: int,
        others: Mapping[int, str],
        limit: float,
        lose: Callable[[str | None, float], None],
    ) -> None:
        self.connect, self.own, self.others, self.limit, self.lose = connect, own, dict(others), limit, lose
        self.period = min(PERIOD, limit / 5)
        self.note: bytes | None = None
        now = time.monotonic()
        self._reached = now
        self._heard = dict.fromkeys(self.others, now)
        self._said: dict[int, bytes] = {}
        self._stopped, self._leaving = threading.Event(), False
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._look, self._judge)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, leaving: bool) -> None:
        """No more judgement from here on. Args: leaving: say so to the others; takes a moment."""
        self._leaving = leaving
        self._stopped.set()
        if leaving:
            self._threads[0].join(_STOP_SECONDS)

    def _look(self) -> None:
        store, count = None, 0
        while not self._stopped.is_set():
            try:
                store = self.connect() if store is None else store
                count += 1
                store.set(_key(self.own), str(count))
                self._listen(store)
                self._reached = time.monotonic()
            except Exception:  # the judge will see; perhaps it comes back
                store = None
            self._stopped.wait(self.period)
        if self._leaving and store is not None:
            try:
                store.set(_key(self.own), LEFT)
            except Exception:
                pass

    def _listen(self, store: dist.Store) -> None:
        if self.note is None and store.check([NOTE]):
            self.note = store.get(NOTE)
            store.add(HEARD, 1)
        numbers = list(self.others)
        now = time.monotonic()
        for number, said in zip(numbers, store.multi_get([_key(number) for number in numbers])):
            if said != self._said.get(number):
                self._said[number], self._heard[number] = said, now

    def _judge(self) -> None:
        while True:
            before = time.monotonic()
            if self._stopped.wait(self.period):
                return
            now = time.monotonic()
            if now - before > 2 * self.period + 1:
                self._reached = now
                self._heard = dict.fromkeys(self.others, now)
                continue
            lost = self._lost(now)
            if lost and not self._stopped.is_set():
                self.lose(lost[0], self.limit)
                return

    def _lost(self, now: float) -> list[str | None]:
        if now - self._reached > self.limit:
            return [None]
        silent = [number for number in self.others if self._said.get(number) != LEFT.encode()]
        return [self.others[number] for number in silent if now - self._heard[number] > self.limit]


def _key(number: int) -> str:
    return f"beat/{number}"
