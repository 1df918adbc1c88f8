"""The order in which a run sees its prompts or samples.

Invariants (tests/data/test_sampler.py):
  - the item at a position is a function of (items, seed, position), whatever was taken before; each epoch holds every
    item once;
  - the order of an epoch does not depend on the order of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from megatron_dlm.config.errors import DataError
from megatron_dlm.diffusion.keys import stream


class Keyed(Protocol):
    """Anything with a content key."""

    key: str


Item = TypeVar("Item", bound=Keyed)


class EpochSampler(Generic[Item]):
    """Which items a run sees, position by position.

        sampler = EpochSampler(prompts, seed)
        batch = sampler.take(prompts_seen, prompts_per_step)

    Positions count items since the start of the run; epoch e is positions e * n to (e + 1) * n - 1. Nothing is
    remembered between calls: a run resumes from its position alone.
    """

    def __init__(self, items: Sequence[Item], seed: int):
        if not items:
            raise DataError("There is nothing to draw from. Give at least one source with prompts or samples.")
        self._items = sorted(items, key=lambda item: item.key)
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._epoch_order)  # a batch can cross from one epoch to the next

    def __len__(self) -> int:
        """Items per epoch."""
        return len(self._items)

    def epoch_order(self, epoch: int) -> list[Item]:
        """All items in the order of one epoch: sorted by a draw that is keyed with (seed, epoch, item)."""
        return list(self._order(epoch))

    def take(self, start_index: int, n: int) -> list[Item]:
        """The items at positions start_index to start_index + n - 1."""
        if start_index < 0 or n < 0:
            raise ValueError(f"positions count from 0 (start {start_index}, {n} items)")
        size = len(self._items)
        return [self._order(index // size)[index % size] for index in range(start_index, start_index + n)]

    def _epoch_order(self, epoch: int) -> tuple[Item, ...]:
        return tuple(sorted(self._items, key=lambda item: stream(self._seed, "order", epoch, item.key)))
