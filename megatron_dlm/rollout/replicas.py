"""Rollout over all replicas: the requests of a job, and one call that generates their responses.

The responses to a prompt stay on one replica, where they share the prompt's pages; which one it is turns out during the
rollout (rollout/queue.py). What is generated does not depend on that: every draw is keyed by prompt and sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.rollout.queue import Queue
from megatron_dlm.rollout.request import Request, rollout_stream
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training import profile

LOOK_EVERY = 8  # passes between two looks at what the other replicas have finished


@dataclass(frozen=True, slots=True)
class Job:
    """What a rollout is for. Two rollouts of the same prompts draw alike when, and only when, their jobs are equal.

    Attributes:
        seed: of the run.
        step: RL step; 0 for an evaluation, which is to draw alike at every step.
        tag: tells apart rollouts for different purposes at the same step.
    """

    seed: int
    step: int
    tag: str = "train"


def requests_for(prompts: Sequence[Prompt], samples: int, sampling: SamplingParams, job: Job) -> list[Request]:
    """All requests for these prompts: `samples` responses each, in order of prompt, then sample."""
    return [
        Request(
            np.asarray(prompt.token_ids, dtype=np.int64),
            sampling,
            prompt.key,
            sample,
            rollout_stream(job.seed, job.step, f"{job.tag}/{prompt.key}", sample),
        )
        for prompt in prompts
        for sample in range(samples)
    ]


@dataclass(slots=True)
class Harvest:
    """What a rollout brought to this replica.

    Attributes:
        finished: complete responses, in order of completion.
        aborted: what others had come to, and those that were to go on and had not yet begun again.
        taken: tickets whose groups were started here.
        places: group that was completed here -> its place among those of all replicas, from 0 (where that was asked).
    """

    finished: list[Trace] = field(default_factory=list)
    aborted: list[Trace] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)


def roll(
    rig: RolloutRig,
    name: str,
    size: int,
    samples: int,
    group: Callable[[int], list[Request]],
    own: Sequence[Request] = (),
    enough: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Harvest:
    """Generate groups of responses on all replicas. Collective over all ranks, which pass the same but for `own`.

    A group is the responses to one prompt. This replica takes groups from a queue as it gets room for them. Replicas
    that share experts step together to the end, those without work too.

    Args:
        name: of the rollout, for people who look into the store.
        size: groups in the queue. samples: requests in each. group: the requests of the group with this number. No two
            requests of a rollout have the same prompt key and sample; with `enough`, no two groups the same prompt.
        own: what this replica has to go on with, or has promised; the longest of them start before all others.
        enough: how many groups have to be complete, on all replicas together; then the others are aborted. None: all.
        progress: called with the number of responses that a pass completed.
    """
    if enough == 0:
        return Harvest()
    queue = Queue(name, size, rig.replica, rig.num_replicas, rig.groups.tp, enough)
    engine, work = rig.engine, _Work(queue)
    engine.submit(work.begin(sorted(own, key=lambda request: -request.num_done)))
    passes, news = 0, True
    while True:
        vacancies = engine.vacancies if work.requests else max(engine.vacancies, 1)
        if queue.wants_to_know(vacancies, news or passes % LOOK_EVERY == 0):
            for ticket in queue.ask(-(-vacancies // samples)):
                work.harvest.taken.append(ticket)
                engine.submit(work.begin(group(ticket)))
            if queue.stopped:
                work.end(engine.abort())
        if engine.idle:
            break
        finished = engine.step()
        profile.after_pass()
        news, passes = work.end(finished), passes + 1
        if progress is not None and finished:
            progress(len(finished))
    work.harvest.places = queue.share(work.harvest.places)
    queue.leave()
    return work.harvest


class _Work:
    """What a replica has begun in a rollout.

    Attributes:
        requests: how many of them are in the engine.
        harvest: what came of them.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue, self.harvest = queue, Harvest()
        self.requests = 0
        self._left: Counter[str] = Counter()  # responses of each group that are not complete

    def begin(self, requests: list[Request]) -> list[Request]:
        self.requests += len(requests)
        self._left.update(request.prompt_key for request in requests)
        return requests

    def end(self, traces: Sequence[Trace]) -> bool:
        """Responses that have left the engine. Whether a group was completed by them."""
        harvest, completed = self.harvest, []
        for trace in traces:
            if trace.finish_reason == "abort":
                harvest.aborted.append(trace)
                continue
            harvest.finished.append(trace)
            self._left[trace.prompt_key] -= 1
            if not self._left[trace.prompt_key]:
                completed.append(trace.prompt_key)
        self.requests -= len(traces)
        if completed and self.queue.enough is not None:
            order = list(self._left)  # those that a pass completes together count in the order in which they began
            for key in sorted(completed, key=order.index):
                harvest.places[key] = self.queue.finished()
        return bool(completed)
