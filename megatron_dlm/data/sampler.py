"""The order in which a run sees its prompts or samples.

Invariants (tests/data/test_sampler.py):
  - what follows a position is a function of (items, seed, position): not of ranks, batch sizes or the order of files;
  - each epoch holds every item once;
  - an item that is added to the data, or taken out of it, moves no other: a resumed run goes on at the same place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from megatron_dlm.config.errors import DataError
from megatron_dlm.diffusion.keys import stream


class Keyed(Protocol):
    """Anything with a content key."""

    key: str


Item = TypeVar("Item", bound=Keyed)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the data, the same for all ranks and layouts.

    Attributes:
        stage: which data: that of 'sft' or 'tracerl'.
        epoch: passes over the data that are complete.
        key: of the item taken last in this epoch; None at its start.
    """

    stage: str
    epoch: int = 0
    key: str | None = None

    @classmethod
    def read(cls, stage: str, saved: Mapping[str, Any] | None) -> Position:
        """The position that `as_dict` wrote, or the start of a stage where none was saved."""
        return cls(stage) if saved is None else cls(stage, saved["epoch"], saved["key"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class EpochSampler(Generic[Item]):
    """Goes over the items epoch by epoch, each time in another order.

        sampler = EpochSampler(prompts, seed, Position("tracerl"))
        batch = sampler.take(prompts_per_step)

    The order of an epoch is that of a hash of (seed, epoch, item), so the items after a position are those with a
    larger hash than its item's. An item whose content occurs several times is told apart by a number.

    Attributes:
        position: after what was taken last; all that a resumed run needs to know.
    """

    def __init__(self, items: Sequence[Item], seed: int, position: Position) -> None:
        if not items:
            raise DataError("There is nothing to draw from. Give at least one source with prompts or samples.")
        copies: Counter[str] = Counter()
        self._items: list[tuple[str, Item]] = []
        for item in sorted(items, key=lambda item: item.key):
            self._items.append((f"{item.key}/{copies[item.key]}" if copies[item.key] else item.key, item))
            copies[item.key] += 1
        self._seed = seed
        self.position = position
        self._orders: dict[int, tuple[tuple[int, str, Item], ...]] = {}  # of the epochs at hand

    def __getstate__(self) -> dict[str, Any]:
        """Without the orders, which can be made again (a process that loads data gets a copy)."""
        return {**self.__dict__, "_orders": {}}

    def __len__(self) -> int:
        """Items per epoch."""
        return len(self._items)

    def take(self, count: int) -> list[Item]:
        """The next `count` items, over the ends of epochs."""
        taken: list[Item] = []
        while len(taken) < count:
            found = self._rest()[: count - len(taken)]
            if found:
                self.position = Position(self.position.stage, self.position.epoch, found[-1][1])
                taken += [item for _, _, item in found]
            else:
                self._next_epoch()
        return taken

    def offer(self, count: int, step: int, at_work: Collection[str]) -> list[Item]:
        """`take`, as a `mixture.Sampler`: an epoch depends on no step, and offers whoever's turn it is."""
        return self.take(count)

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs, as a `mixture.Sampler`."""
        return {"position": self.position.as_dict()}

    def take_distinct(self, count: int) -> list[Item]:
        """The next `count` items, all of one epoch: its last few are left out where they are too few (others in each
        epoch).

        Raises:
            ValueError: an epoch has fewer.
        """
        if count > len(self):
            raise ValueError(f"{count} different items were asked for, and there are {len(self)}")
        if len(self._rest()) < count:
            self._next_epoch()
        return self.take(count)

    def _next_epoch(self) -> None:
        self.position = Position(self.position.stage, self.position.epoch + 1)

    def _rest(self) -> Sequence[tuple[int, str, Item]]:
        """What is left of the epoch at hand: (place, key, item) in order."""
        order, key = self._order(self.position.epoch), self.position.key
        if key is None:
            return order
        return order[bisect_right(order, (self._place(self.position.epoch, key), key), key=lambda entry: entry[:2]) :]

    def _order(self, epoch: int) -> tuple[tuple[int, str, Item], ...]:
        if epoch not in self._orders:
            for old in list(self._orders)[:-1]:  # a batch can cross from one epoch to the next
                del self._orders[old]
            entries = ((self._place(epoch, key), key, item) for key, item in self._items)
            self._orders[epoch] = tuple(sorted(entries, key=lambda entry: entry[:2]))
        return self._orders[epoch]

    def _place(self, epoch: int, key: str) -> int:
        return stream(self._seed, "order", epoch, key)
