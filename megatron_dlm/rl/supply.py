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

With --dynamic-sampling a step that was judged asks for `more` prompts, until enough of its groups can be learned from.
Usable groups on top of that are dropped, and their prompts are owed. Whose turn it is among prompts that are not owed
is said by a sampler: of epochs, of difficulty, or of a mixture of sources (rl/difficulty.py).

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

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.sampler import EpochSampler
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rl.difficulty import open_sampler
from megatron_dlm.rl.exchange import Graded, by_group
from megatron_dlm.rl.kept import Kept, file_of
from megatron_dlm.rl.pass_rates import PassRates
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

        fresh = supply.begin(step)                                # new prompts of this step
        harvest = roll(..., own=supply.going_on(seed), enough=supply.missing)
        traces = supply.settle(harvest, fresh, step)              # what this replica has of the groups to learn from
        supply.observe(graded)                                    # how they were judged

    Args:
        prompts: all there are, no two with the same key.
        stage, seed: of the sampler.
        rig: which replica this is.
        config, sampling: of training rollouts.
        progress: of the run that is resumed, as `progress` returned it; empty for a new one.
        curriculum: how prompts are chosen.

    Attributes:
        sampler: says whose turn it is.
        rates: how often each prompt was solved, where prompts are chosen by that; else None.
        asked: the new prompts of this step, in the order of their turns.
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
        curriculum: CurriculumConfig | None = None,
    ) -> None:
        curriculum = curriculum or CurriculumConfig()
        self.prompts = {prompt.key: prompt for prompt in prompts}
        by_difficulty = curriculum.prompt_sampling == "difficulty"
        self.rates = PassRates(curriculum.difficulty_momentum) if by_difficulty else None
        self.sampler = open_sampler(prompts, stage, seed, curriculum, self.rates, progress)
        self.rig, self.config, self.sampling = rig, config, sampling
        self.samples = config.n_samples_per_prompt
        self.kept: list[Kept] = []
        self.asked: list[Prompt] = []
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
            **self.sampler.progress(),
            "owed": [prompt.key for prompt in self._owed],
            "kept_groups": len(self._everywhere),
            **({} if self.rates is None else {"pass_rates": len(self.rates)}),
        }

    def begin(self, step: int) -> list[Prompt]:
        """The new prompts of a step. The same on every rank."""
        self.asked = self._begin(step)
        return self.asked

    def more(self, count: int, step: int) -> list[Prompt]:
        """Further new prompts of this step, other ones than it has had: `count`, or as many as there are. The same on
        every rank.
        """
        had = {prompt.key for prompt in self.asked}
        found = self._fresh(min(count, len(self.prompts) - len(had)), step, had)
        self.asked = [*self.asked, *found]
        if len({prompt.key for prompt in self.asked}) != len(self.asked):  # their responses would draw alike
            raise AssertionError(f"a prompt came twice in step {step}")
        return found

    def observe(self, graded: Iterable[Graded]) -> None:
        """Remember how prompts were solved. `graded`: the records of all ranks."""
        if self.rates is not None:
            groups = by_group(graded)
            self.rates.visit(
                {
                    key: sum(record.accuracy for record in members) / len(members)
                    for key, members in sorted(groups.items())
                }
            )

    def owe(self, keys: Iterable[str]) -> None:
        """These prompts are the first new ones of the next step."""
        for key in keys:
            self._owe(self.prompts[key])

    def metrics(self) -> dict[str, float]:
        """What is known of the prompts, where they are chosen by that."""
        if self.rates is None:
            return {}
        rows = self.rates.rows(self.prompts)
        seen = self.rates.visits[rows] > 0
        rates = self.rates.rates[rows][seen]
        metrics = {"curriculum/seen_ratio": float(seen.mean())}
        if len(rates):
            metrics |= {
                "curriculum/pass_rate": float(rates.mean()),
                "curriculum/solved_ratio": float((rates == 1).mean()),
                "curriculum/unsolved_ratio": float((rates == 0).mean()),
            }
        return metrics

    def _begin(self, step: int) -> list[Prompt]:
        wanted, batch = self.config.over_sampling_batch_size, self.config.rollout_batch_size
        if wanted is None:
            if isinstance(self.sampler, EpochSampler) and not self._owed:
                return self.sampler.take_distinct(batch)
            return self._fresh(batch, step)
        complete = [key for key, is_complete in self._everywhere if is_complete]
        self._ready, self.missing = complete[:batch], max(0, batch - len(complete))
        self.continued = {(group.key, sample) for group in self.kept for sample in group.traces}
        return self._fresh(max(0, wanted - len(self._everywhere)), step) if self.missing else []

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
        """What writes the kept groups of all replicas (rl/kept.py) and the pass rates (rl/pass_rates.py) into a
        checkpoint's folder. Collective.
        """
        writers = [file_of(self.kept, self.rig.is_leader)] if self._everywhere else []
        if self.rates:  # None, or nothing was seen
            writers.append(self.rates.write)
        if not writers:
            return None

        def write_all(folder: Path) -> None:
            for write in writers:
                write(folder)

        return write_all

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

    def _fresh(self, count: int, step: int, had: Iterable[str] = ()) -> list[Prompt]:
        """Prompts that are not at work: those that are owed, then those whose turn it is. `had`: keys of prompts that
        the step has had.
        """
        busy = {key for key, _ in self._everywhere} | set(had)
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
            candidates = self.sampler.offer(count - len(found), step, busy)
            if not candidates:
                raise ValueError(f"{count} prompts were asked for, and {len(found)} are not at work")

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
