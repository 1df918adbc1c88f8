"""Numbers that the ranks of a job count together without waiting for each other.

They live in the store of torch.distributed, whose `add` is atomic: each value that it returns, it returns once. A set
of counters has a name of its own and is deleted when all that use it have left.

Invariants (tests/parallel/test_counters.py):
  - amounts that are added at the same time are all counted, and no two ranks are told the same sum;
  - sets that follow each other do not mix, whatever one rank still does with the earlier one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count

from torch.distributed import distributed_c10d

_opened = count()  # every rank opens the same sets in the same order


class Counters:
    """Counters that begin at 0.

        counters = Counters("rollout", members=4)
        if counters.add("taken", 1) <= 10: ...
        counters.leave(["taken"])               # each member, once

    Args:
        name: what they are for; every rank of the job makes the same sets in the same order.
        members: how many ranks count. One alone counts by itself, without the store.
    """

    def __init__(self, name: str, members: int) -> None:
        self.members = members
        self._own: Counter[str] | None = None
        if members == 1:
            self._own = Counter()
        else:
            self._store, self._prefix = distributed_c10d._get_default_store(), f"megatron_dlm/{next(_opened)}/{name}"

    def add(self, counter: str, amount: int) -> int:
        """The sum with this amount in it."""
        if self._own is not None:
            self._own[counter] += amount
            return self._own[counter]
        return self._store.add(f"{self._prefix}/{counter}", amount)

    def read(self, counter: str) -> int:
        """What it has come to."""
        return self.add(counter, 0)

    def leave(self, used: Iterable[str]) -> None:
        """This member counts no more. The last one deletes the counters that anybody may have used."""
        if self._own is None and self.add("left", 1) == self.members:
            for counter in [*used, "left"]:
                self._store.delete_key(f"{self._prefix}/{counter}")
