"""Who generates what, decided while it is generated: replicas take work as they get free.

Tickets are numbers 0, 1, 2, ...; each is one unit of work. They lie in lanes, one for each replica: replica r's are
r, r + n, r + 2n, ... of n replicas. A replica takes from its own lane first, as many at a time as it has room for. When
that is empty it helps out in the others', with half of what is left there at most. A lane is open to others once its
owner has begun, so that replicas that have room for all of theirs do the same work however their starts fall.

Of a tensor-parallel group the leader takes tickets and tells the others. The number of replicas that share the work is
small, and so is what each of them asks: one counter of the job's store per lane, and one request to it per refill.

Invariants (tests/rollout/test_queue.py):
  - each ticket is taken once;
  - when every replica has seen `exhausted`, none is left.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_dlm.parallel.counters import Counters
from megatron_dlm.parallel.exchange import broadcast_integers, broadcast_object

_FINISHED = "finished"


class Queue:
    """The tickets of one rollout, as one rank sees them. Ranks of a replica make the same calls.

    Args:
        name: of the rollout.
        size: number of tickets.
        replica, num_replicas: which of how many this rank is part of.
        group: the ranks of the replica; None for one rank.
        enough: how many units of work have to be finished anywhere; None for all.

    Attributes:
        exhausted: this replica gets no more tickets.
        stopped: enough units are finished.
    """

    def __init__(
        self,
        name: str,
        size: int,
        replica: int = 0,
        num_replicas: int = 1,
        group: dist.ProcessGroup | None = None,
        enough: int | None = None,
    ) -> None:
        self.size, self.replica, self.num_replicas, self.enough = size, replica, num_replicas, enough
        # A single replica knows all there is to know: each of its ranks counts for itself.
        self.group = group if num_replicas > 1 and group is not None and dist.get_world_size(group) > 1 else None
        self.is_leader = self.group is None or dist.get_rank(self.group) == 0
        self.counters = Counters(name, num_replicas)
        self.exhausted = self.stopped = False
        self.begun = False
        self._empty = {lane for lane in range(num_replicas) if not self._length(lane)}

    def wants_to_know(self, vacancies: int, news: bool) -> bool:
        """Whether it is time to ask. The same on all ranks of a replica.

        Args:
            vacancies: for how many more requests this replica has room.
            news: something has happened, or some time has passed, since the last look at the other replicas.
        """
        if not self.begun:
            return True
        return not self.stopped and ((not self.exhausted and vacancies > 0) or (self.enough is not None and news))

    def ask(self, wanted: int) -> range:
        """At most `wanted` tickets; `exhausted` and `stopped` are as they are now. The first call opens the lane."""
        answer = self._ask(wanted) if self.is_leader else (0, 0, 0, 0, 0)
        if self.group is not None:
            answer = broadcast_integers(answer, 0, self.group)
        first, count, lane, exhausted, stopped = answer
        self.begun, self.exhausted, self.stopped = True, bool(exhausted), bool(stopped)
        return range(lane + first * self.num_replicas, lane + (first + count) * self.num_replicas, self.num_replicas)

    def finished(self) -> int:
        """A unit is finished. Returns its place among all that are, from 0; on the leader only."""
        return self.counters.add(_FINISHED, 1) - 1 if self.is_leader else -1

    def share(self, places: dict[str, int]) -> dict[str, int]:
        """The leader's places, on all ranks of the replica."""
        return places if self.group is None else broadcast_object(places, 0, self.group)

    def leave(self) -> None:
        """This rank needs the queue no more."""
        if self.is_leader:
            self.counters.leave([_FINISHED, *(_lane(replica) for replica in range(self.num_replicas))])

    def _ask(self, wanted: int) -> tuple[int, int, int, bool, bool]:
        if self.enough is not None and self.counters.read(_FINISHED) >= self.enough:
            return 0, 0, 0, True, True
        if not self.begun:
            self.counters.add(_lane(self.replica), 1)  # a lane that is begun counts one more than was taken from it
        lanes = [(self.replica + step) % self.num_replicas for step in range(self.num_replicas)]
        for lane in lanes if wanted > 0 else ():
            first, count = self._take(lane, wanted)
            if count:
                return first, count, lane, len(self._empty) == self.num_replicas, False
        return 0, 0, 0, len(self._empty) == self.num_replicas, False

    def _take(self, lane: int, wanted: int) -> tuple[int, int]:
        """From one lane: the first ticket's place in it, and how many they are."""
        if lane in self._empty:
            return 0, 0
        length = self._length(lane)
        if lane != self.replica:
            taken = self.counters.read(_lane(lane)) - 1
            if taken < 0:
                return 0, 0  # not begun
            wanted = min(wanted, max(1, (length - taken) // 2))
            if taken >= length:
                self._empty.add(lane)
                return 0, 0
        end = self.counters.add(_lane(lane), wanted) - 1
        if end >= length:
            self._empty.add(lane)
        first = end - wanted
        return first, max(0, min(end, length) - first)

    def _length(self, lane: int) -> int:
        return len(range(lane, self.size, self.num_replicas))


def _lane(replica: int) -> str:
    return f"lane {replica}"
