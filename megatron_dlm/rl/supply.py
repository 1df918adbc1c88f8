"""The prompts of each RL step, and what a step leaves to the next.

A step learns from --rollout-batch-size groups; a group is a prompt with all its responses. With
--over-sampling-batch-size it works on more of them, and is over when enough are complete, wherever that is. What is
left is the rest:

    --partial-rollout    groups that were begun are kept, finished responses and aborted ones, on the replica that has
                         them, and go on there in the next step before new prompts do; those that came in too late are
                         learned from next
    otherwise            they are dropped

Prompts that were not begun, or were dropped, are owed: they are the first new ones of the next step. So is the next
turn of a prompt that the sampler offers while its group is still at work. A prompt is owed one turn at most: where
there are hardly more prompts than a step works on, turns that come on top of it lapse.

A response keeps the key of the step in which its group began, so it goes on drawing as if it had never stopped.

Invariants (tests/rl/test_supply.py):
  - a step learns from exactly --rollout-batch-size groups, each of different prompts, and a group is learned from once;
  - every prompt that the sampler gave is learned from, kept or owed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rl.kept import Kept, file_of
from megatron_dlm.rollout.replicas import Harvest, Job, requests_for
from megatron_dlm.rollout.request import Request
from megatron_dlm.rollout.rig import RolloutRig


@dataclass(frozen=True, slots=True)
class Settled:
    """What all ranks must know of a replica after a rollout.

    Attributes:
        learned: groups that the step learns from.
        kept: groups that it keeps, and whether they are complete.
        aborted: number of responses that were stopped.
    """

    learned: list[str]
    kept: list[tuple[str, bool]]
    aborted: int


class Supply:
    """Decides the prompts of each step, the same on every rank.

        fresh = supply.begin()                                    # new prompts of this step
        harvest = roll(..., own=supply.going_on(seed), enough=supply.missing)
        traces = supply.settle(harvest, fresh, step)              # what this replica has of the groups to learn from

    Args:
        prompts: all there are, no two with the same key.
        stage, seed: of the sampler.
        rig: which replica this is.
        config, sampling: of training rollouts.
        progress: of the run that is resumed, as `progress` returned it; empty for a new one.

    Attributes:
        sampler: gives prompts in the order of epochs.
        kept: groups of this replica, complete ones first.
        missing: how many groups of this step are still to be completed, on all replicas; None: all that are begun.
        continued: (prompt key, sample) of responses that this replica kept from an earlier step.
        aborted: responses that were stopped in this step, on all replicas.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        stage: str,
        seed: int,
        rig: RolloutRig,
        config: RolloutConfig,
        sampling: SamplingParams,
        progress: Mapping[str, Any],
    ) -> None:
        self.sampler = EpochSampler(prompts, seed, Position.read(stage, progress.get("position")))
        self.prompts = {prompt.key: prompt for prompt in prompts}
        self.rig, self.config, self.sampling = rig, config, sampling
        self.samples = config.n_samples_per_prompt
        self.kept: list[Kept] = []
        self.missing: int | None = None
        self.continued: set[tuple[str, int]] = set()
        self.aborted = 0
        self._ready: list[str] = []  # complete groups of earlier steps that this step learns from
        self._everywhere: list[tuple[str, bool]] = []  # kept groups of all replicas, and whether they are complete
        # What is no longer among the prompts is owed no more.
        self._owed = [self.prompts[key] for key in progress.get("owed", ()) if key in self.prompts]

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs besides the kept groups; JSON can hold it."""
        return {
            "position": self.sampler.position.as_dict(),
            "owed": [prompt.key for prompt in self._owed],
            "kept_groups": len(self._everywhere),
        }

    def begin(self) -> list[Prompt]:
        """The new prompts of a step. The same on every rank."""
        wanted, batch = self.config.over_sampling_batch_size, self.config.rollout_batch_size
        if wanted is None:
            return self._fresh(batch) if self._owed else self.sampler.take_distinct(batch)
        complete = [key for key, is_complete in self._everywhere if is_complete]
        self._ready, self.missing = complete[:batch], max(0, batch - len(complete))
        self.continued = {(group.key, sample) for group in self.kept for sample in group.traces}
        return self._fresh(max(0, wanted - len(self._everywhere))) if self.missing else []

    def going_on(self, seed: int) -> list[Request]:
        """The requests of this replica's kept groups that are not finished."""
        requests = []
        for group in self.kept:
            prompt, job = self.prompts[group.key], Job(seed, group.step)
            for request in requests_for([prompt], self.samples, self.sampling, job):
                trace = group.traces.get(request.sample)
                if trace is None or trace.finish_reason == "abort":
                    requests.append(dataclasses.replace(request, partial=trace))
        return requests

    def settle(self, harvest: Harvest, fresh: Sequence[Prompt], step: int) -> list[Trace]:
        """Share out what a rollout has brought. Collective over all ranks.

        Returns:
            The traces of the groups that this replica has and the step learns from, in order of prompt and sample.
        """
        groups = {group.key: group for group in self.kept}
        groups |= {fresh[ticket].key: Kept(fresh[ticket].key, step) for ticket in sorted(harvest.taken)}
        for trace in [*harvest.aborted, *harvest.finished]:
            if trace.finish_reason != "abort" or len(trace.response_ids):  # else there is nothing to keep
                groups[trace.prompt_key].traces[trace.sample] = trace
        learned = [key for key, group in groups.items() if self._is_learned(group, harvest.places)]
        traces = [trace for key in learned for _, trace in sorted(groups.pop(key).traces.items())]
        if self.missing is not None:
            self._keep(groups.values(), harvest.places)
            self._account(learned, fresh, len(harvest.aborted))
        return traces

    def files(self) -> Callable[[Path], None] | None:
        """What writes the kept groups of all replicas into a checkpoint's folder (rl/kept.py). Collective."""
        return file_of(self.kept, self.rig.is_leader) if self._everywhere else None

    def restore(self, groups: Sequence[Kept]) -> int:
        """Take over the kept groups of all replicas of an earlier run, in the order in which they were kept.

        Returns: how many of them start anew: their prompts are gone or others now, they were begun under other
            settings, or nothing is kept any more. Prompts that are still there are owed.
        """
        fitting = [group for group in groups if self._fits(group)]
        for group in groups:
            if group not in fitting and group.key in self.prompts:
                self._owe(self.prompts[group.key])
        self.kept = fitting[self.rig.replica :: self.rig.num_replicas]
        self._everywhere = [(group.key, group.is_complete(self.samples)) for group in fitting]
        return len(groups) - len(fitting)

    def _fits(self, group: Kept) -> bool:
        prompt = self.prompts.get(group.key)
        return (
            self.config.partial_rollout
            and prompt is not None
            and all(
                trace.sampling == self.sampling
                and sample < self.samples
                and tuple(trace.prompt_ids.tolist()) == tuple(prompt.token_ids)
                for sample, trace in group.traces.items()
            )
        )

    def _fresh(self, count: int) -> list[Prompt]:
        """Prompts that are not at work: those that are owed, then those whose turn it is."""
        busy = {key for key, _ in self._everywhere}
        found: list[Prompt] = []
        candidates, self._owed = self._owed, []
        while True:
            for prompt in candidates:
                if prompt.key in busy or len(found) == count:
                    self._owe(prompt)
                else:
                    busy.add(prompt.key)
                    found.append(prompt)
            if len(found) == count:
                return found
            candidates = self.sampler.take(count - len(found))

    def _owe(self, prompt: Prompt) -> None:
        if prompt not in self._owed:
            self._owed.append(prompt)

    def _is_learned(self, group: Kept, places: Mapping[str, int]) -> bool:
        """Whether a group is among those that this step learns from."""
        if self.missing is None or group.key in self._ready:
            return True
        return places.get(group.key, self.missing) < self.missing

    def _keep(self, groups: Iterable[Kept], places: Mapping[str, int]) -> None:
        """Those that were begun stay here: complete ones first, in the order of their completion."""
        kept = [group for group in groups if group.traces] if self.config.partial_rollout else []
        place = lambda group: places.get(group.key, -1)  # complete since an earlier step: before all others
        self.kept = sorted(kept, key=lambda group: (not group.is_complete(self.samples), place(group)))

    def _account(self, learned: list[str], fresh: Sequence[Prompt], aborted: int) -> None:
        """Tell all ranks what became of the groups, and hear it from them."""
        kept = [(group.key, group.is_complete(self.samples)) for group in self.kept]
        reports = gather_objects(Settled(learned, kept, aborted) if self.rig.is_leader else Settled([], [], 0))
        self._everywhere = [one for report in reports for one in report.kept]
        self.aborted = sum(report.aborted for report in reports)
        settled = {key for report in reports for key in report.learned} | {key for key, _ in self._everywhere}
        before, self._owed = self._owed, []
        for prompt in [*(prompt for prompt in fresh if prompt.key not in settled), *before]:
            self._owe(prompt)
