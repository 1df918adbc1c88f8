"""From rollouts on many replicas to the traces that each rank trains on.

Every rank first learns one light record per response (`Graded`): reward, lengths, what it would cost in a row. From
those all ranks derive the same groups, advantages, updates and rows. Only then does a trace move, once, to the ranks
that train on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_dlm.diffusion.planner import Load
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.parallel.exchange import exchange_objects, gather_objects
from megatron_dlm.rl.normalise import Counts


@dataclass(frozen=True, slots=True)
class Graded:
    """A response without its tokens.

    Attributes:
        group, sample: the prompt's key, and which of its responses.
        owner, index: the global rank that holds the trace, and its place there.
        correct: the verdict. score: what the judge gave instead of right and wrong, or None.
        reward: what the response earned: its verdict after the over-long rule, and what else is rewarded (rewards.py).
        length: response tokens. steps: denoising steps. forwards: model passes.
        truncated: it was cut at the limit. overlong: it ended so near the limit that it counts as wrong.
        judge_failed: its judge crashed or ran out of time, and so it counts as wrong.
        load: its size in a row. parts: those of its parts, if it may stand in several rows (views.split_views).
        counts: of what would be learned.
        continued: it was begun in an earlier step. stale: tokens that older weights decided than those of this step;
            version_lag, largest_lag: how many updates older, in sum and at most.
        tests_passed: share of the tests that its program passes; None where there are none.
        form: 1 if it has the form of --format-reward.
        chunks: scores of its parts by --process-reward. chunks_failed: parts that could not be judged.
    """

    group: str
    sample: int
    owner: int
    index: int
    correct: float
    reward: float
    length: int
    steps: int
    forwards: int
    truncated: bool
    overlong: bool
    judge_failed: bool
    load: Load
    counts: Counts
    continued: bool = False
    stale: int = 0
    version_lag: int = 0
    largest_lag: int = 0
    score: float | None = None
    tests_passed: float | None = None
    form: float = 0.0
    chunks: tuple[float, ...] = ()
    chunks_failed: int = 0
    parts: tuple[Load, ...] = ()

    @property
    def num_targets(self) -> int:
        return self.counts.targets

    @property
    def accuracy(self) -> float:
        """How right it is, after the over-long rule: what accuracy bands and pass rates go by."""
        return 0.0 if self.overlong else self.correct


def by_group(graded: Iterable[Graded]) -> dict[str, list[Graded]]:
    """The records of each group, in the order in which they come."""
    groups: dict[str, list[Graded]] = {}
    for record in graded:
        groups.setdefault(record.group, []).append(record)
    return groups


def gather_graded(mine: Sequence[Graded]) -> list[Graded]:
    """All records of all ranks, in one order that does not depend on who generated what. Collective over all ranks."""
    everyone = [graded for part in gather_objects(list(mine)) for graded in part]
    return sorted(everyone, key=lambda graded: (graded.group, graded.sample))


def deliver(wanted: Sequence[Sequence[Graded]], mine: Sequence[Trace], rank: int) -> list[Trace]:
    """Move traces to the ranks that want them. Collective over all ranks.

    Args:
        wanted: for every global rank, the records of the traces that it trains on.
        mine: the traces that this rank holds, where `Graded.index` points.

    Returns:
        The traces that this rank wants, in the order of `wanted[rank]`.
    """
    outgoing = {
        destination: [((graded.group, graded.sample), mine[graded.index]) for graded in records if graded.owner == rank]
        for destination, records in enumerate(wanted)
    }
    received = dict(exchange_objects(outgoing))
    return [received[graded.group, graded.sample] for graded in wanted[rank]]
