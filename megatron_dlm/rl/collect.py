"""The responses of one RL step: generated, judged, and recorded where every rank can see them.

A rank holds the traces of its replica's responses. What all ranks know of every response is a light record (`Graded`),
from which they derive the same groups, advantages and updates.

With --dynamic-sampling a step goes through rounds: it generates and judges, and as long as fewer groups than
--rollout-batch-size can be learned from (rl/bands.py), it goes on with other prompts, as many as the share of usable
groups so far lets expect to be needed. Every rank decides that from the same records.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.planner import Load
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.views import Item, split_views
from megatron_dlm.rewards.base import CRASH, TIMEOUT, Scorer, Verdict
from megatron_dlm.rl.advantages import overlong
from megatron_dlm.rl.bands import Level, level
from megatron_dlm.rl.earnings import Earnings
from megatron_dlm.rl.exchange import Graded, by_group, gather_graded
from megatron_dlm.rl.methods import TARGET, counts_of, method_of
from megatron_dlm.rl.samples import Judged, dump
from megatron_dlm.rl.supply import Supply
from megatron_dlm.rollout.replicas import Job, requests_for, roll
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training.report import Report


@dataclass(frozen=True, slots=True)
class Rollout:
    """The responses of one RL step.

    Attributes:
        judged: those that this rank judged and whose traces it holds.
        graded: the records of all.
        surplus: groups that could be learned from and are not, for the step has enough without them.
    """

    judged: list[Judged]
    graded: list[Graded]
    surplus: frozenset[str] = frozenset()

    @property
    def traces(self) -> list[Trace]:
        return [one.trace for one in self.judged]

    @property
    def candidates(self) -> list[Graded]:
        """Records of the groups that the step may learn from."""
        return [record for record in self.graded if record.group not in self.surplus]

    def and_then(self, later: Rollout) -> Rollout:
        """Together with a later round, which had other prompts."""
        before = Counter(record.owner for record in self.graded)
        moved = [dataclasses.replace(record, index=record.index + before[record.owner]) for record in later.graded]
        graded = sorted([*self.graded, *moved], key=lambda record: (record.group, record.sample))
        return Rollout([*self.judged, *later.judged], graded)


class Collector:
    """Generates and judges.

    Args:
        rank: global rank of this process.
        item_of: how a trace will be laid out, asked for its size in a row and its number of targets.
        curriculum: whether a step goes on until its batch is full.
        earnings: what is rewarded besides the verdict; None: nothing.
    """

    def __init__(
        self,
        rig: RolloutRig,
        supply: Supply,
        scorer: Scorer,
        tokenizer,
        rank: int,
        rl: RLConfig,
        rollout: RolloutConfig,
        sampling: SamplingParams,
        seed: int,
        item_of: Callable[[Trace], Item],
        curriculum: CurriculumConfig | None = None,
        earnings: Earnings | None = None,
    ) -> None:
        self.earnings = earnings
        self.curriculum = curriculum or CurriculumConfig()
        self.rig, self.supply, self.scorer, self.tokenizer = rig, supply, scorer, tokenizer
        self.rl, self.rollout, self.sampling, self.seed = rl, rollout, sampling, seed
        self.rank, self.item_of = rank, item_of

    def collect(
        self,
        step: int,
        report: Report,
        generating: Callable[[], AbstractContextManager[None]],
        judging: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Rollout, int, dict[str, float]]:
        """All rounds of a step. Collective.

        Args:
            generating, judging: what surrounds these phases in each round.

        Returns:
            (the responses, how many tokens this replica generated, metrics)
        """
        with generating():
            traces, tokens = self.generate(step, report)
        with judging():
            rollout = self.grade(step, traces)
        rounds = 1
        while self.curriculum.dynamic_sampling and rounds < self.curriculum.max_sampling_rounds:
            prompts = self.supply.more(self._wanted(rollout.graded), step)
            if not prompts:  # the batch is full, or there are no others
                break
            rounds += 1
            with generating():
                traces, more = self.generate(step, report, prompts, rounds)
            with judging():
                rollout = rollout.and_then(self.grade(step, traces, rounds))
            tokens += more
        levels = self._levels(rollout.graded)
        if self.curriculum.dynamic_sampling:
            usable = [prompt.key for prompt in self.supply.asked if levels[prompt.key] is Level.USABLE]
            surplus = usable[self.rollout.rollout_batch_size :]
            self.supply.owe(surplus)
            rollout = dataclasses.replace(rollout, surplus=frozenset(surplus))
        earned = {} if self.earnings is None else self.earnings.metrics(rollout.graded)
        return rollout, tokens, self._metrics(rounds, levels) | earned

    def generate(
        self, step: int, report: Report, further: Sequence[Prompt] | None = None, sampling_round: int = 1
    ) -> tuple[list[Trace], int]:
        """The responses to learn from that this replica has, and how many tokens it generated for whatever response.

        Args:
            further: prompts of a later round; None begins the step.
        """
        supply, samples, name = self.supply, self.rollout.n_samples_per_prompt, f"rollout {step}"
        if further is None:
            fresh, own = supply.begin(step), supply.going_on(self.seed)
        else:
            fresh, own, name = further, [], f"{name}, round {sampling_round}"
        group = lambda ticket: requests_for([fresh[ticket]], samples, self.sampling, Job(self.seed, step))
        with report.bar(len(own) + len(fresh) * samples // self.rig.num_replicas, name) as bar:
            harvest = roll(self.rig, name, len(fresh), samples, group, own, supply.missing, bar.update)
        had = {(request.prompt_key, request.sample): request.num_done for request in own}
        ended = [*harvest.finished, *harvest.aborted]
        tokens = sum(len(trace.response_ids) - had.get((trace.prompt_key, trace.sample), 0) for trace in ended)
        return supply.settle(harvest, fresh, step), tokens

    def grade(self, step: int, traces: list[Trace], sampling_round: int = 1) -> Rollout:
        """Verdicts of this replica's responses, and the records of everybody's. Of a tensor-parallel group one rank
        judges. Collective.
        """
        judged, records = self._judge(step, traces, sampling_round) if self.rig.is_leader else ([], [])
        graded = gather_graded(records)
        if self.earnings is not None:
            graded = self.earnings.complete(graded, judged)
        self.supply.observe(graded)
        return Rollout(judged, graded)

    def _wanted(self, graded: Sequence[Graded]) -> int:
        """How many prompts the next round should have: what is missing, over the share that was usable so far."""
        levels, batch = self._levels(graded), self.rollout.rollout_batch_size
        usable = sum(found is Level.USABLE for found in levels.values())
        missing = max(0, batch - usable)
        return min(batch, -(-missing * len(levels) // usable)) if usable else batch

    def _levels(self, graded: Sequence[Graded]) -> dict[str, Level]:
        return {
            key: level(members, self.rl, None if self.earnings is None else self.earnings.config)
            for key, members in by_group(graded).items()
        }

    def _metrics(self, rounds: int, levels: dict[str, Level]) -> dict[str, float]:
        found = Counter(levels.values())
        metrics = {"rollout/sampling_rounds": float(rounds)} if self.curriculum.dynamic_sampling else {}
        return metrics | {
            "rollout/usable_ratio": found[Level.USABLE] / len(levels),
            "rollout/dropped_too_easy": float(found[Level.TOO_EASY]),
            "rollout/dropped_too_hard": float(found[Level.TOO_HARD]),
            **self.supply.metrics(),
        }

    def _judge(self, step: int, traces: list[Trace], sampling_round: int) -> tuple[list[Judged], list[Graded]]:
        prompts = self.supply.prompts
        texts = [self.tokenizer.decode(trace.response_ids.tolist(), skip_special_tokens=True) for trace in traces]
        verdicts = self.scorer.score([(prompts[trace.prompt_key], text) for trace, text in zip(traces, texts)])
        judged = [
            Judged(prompts[trace.prompt_key], trace, text, verdict)
            for trace, text, verdict in zip(traces, texts, verdicts)
        ]
        if self.rl.save_debug_rollout_data is not None:
            dump(self.rl.save_debug_rollout_data, step, self.rank, judged, sampling_round)
        forms = [0.0] * len(texts) if self.earnings is None else self.earnings.forms(texts)
        too_long = overlong(
            [len(trace.response_ids) for trace in traces],
            self.rollout.rollout_max_response_len,
            self.rl.overlong_margin,
        )
        return judged, [
            self._record(index, trace, verdict, bool(cut), form)
            for index, (trace, verdict, cut, form) in enumerate(zip(traces, verdicts, too_long, forms))
        ]

    def _parts(self, item: Item) -> tuple[Load, ...]:
        """Of a response whose copies may stand in several rows; what has one ratio may not."""
        if method_of(self.rl).unit != TARGET:
            return ()
        found = split_views(item, self.rl.max_tokens_per_row)
        return tuple(load_of(part) for part in found)

    def _record(self, index: int, trace: Trace, verdict: Verdict, too_long: bool, form: float) -> Graded:
        item = self.item_of(trace)
        lag = self.rig.engine.weight_version - trace.weight_versions
        return Graded(
            group=trace.prompt_key,
            sample=trace.sample,
            owner=self.rank,
            index=index,
            correct=verdict.correct,
            reward=0.0 if too_long else verdict.correct,
            length=len(trace.response_ids),
            steps=trace.num_steps,
            forwards=trace.num_forwards,
            truncated=trace.finish_reason == "length",
            overlong=too_long,
            judge_failed=verdict.reason.partition(":")[0] in (CRASH, TIMEOUT),
            load=load_of(item),
            parts=self._parts(item),
            counts=counts_of(item, method_of(self.rl).unit),
            continued=(trace.prompt_key, trace.sample) in self.supply.continued,
            stale=int((lag > 0).sum()),
            version_lag=int(lag.sum()),
            largest_lag=int(lag.max(initial=0)),
            score=verdict.score,
            tests_passed=verdict.score if verdict.parts else None,
            form=form,
        )
