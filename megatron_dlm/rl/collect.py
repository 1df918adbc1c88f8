"""The responses of one RL step: generated, judged, and recorded where every rank can see them.

A rank holds the traces of its replica's responses. What all ranks know of every response is a light record (`Graded`),
from which they derive the same groups, advantages and updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.diffusion.planner import Load
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.views import Item
from megatron_dlm.rewards.base import CRASH, TIMEOUT, Scorer, Verdict
from megatron_dlm.rl.advantages import overlong
from megatron_dlm.rl.exchange import Graded, gather_graded
from megatron_dlm.rl.samples import Judged, dump
from megatron_dlm.rl.supply import Supply
from megatron_dlm.rollout.replicas import Job, requests_for, roll
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training.report import Report


@dataclass(frozen=True, slots=True)
class Rollout:
    """The responses of one RL step: those that this rank judged and whose traces it holds, and the records of all."""

    judged: list[Judged]
    graded: list[Graded]

    @property
    def traces(self) -> list[Trace]:
        return [one.trace for one in self.judged]


class Collector:
    """Generates and judges.

    Args:
        rank: global rank of this process.
        item_of: how a trace will be laid out, asked for its size in a row and its number of targets.
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
    ) -> None:
        self.rig, self.supply, self.scorer, self.tokenizer = rig, supply, scorer, tokenizer
        self.rl, self.rollout, self.sampling, self.seed = rl, rollout, sampling, seed
        self.rank, self.item_of = rank, item_of

    def generate(self, step: int, report: Report) -> tuple[list[Trace], int]:
        """The responses to learn from that this replica has, and how many tokens it generated for whatever response."""
        supply, samples, name = self.supply, self.rollout.n_samples_per_prompt, f"rollout {step}"
        fresh, own = supply.begin(), supply.going_on(self.seed)
        group = lambda ticket: requests_for([fresh[ticket]], samples, self.sampling, Job(self.seed, step))
        with report.bar(len(own) + len(fresh) * samples // self.rig.num_replicas, name) as bar:
            harvest = roll(self.rig, name, len(fresh), samples, group, own, supply.missing, bar.update)
        had = {(request.prompt_key, request.sample): request.num_done for request in own}
        ended = [*harvest.finished, *harvest.aborted]
        tokens = sum(len(trace.response_ids) - had.get((trace.prompt_key, trace.sample), 0) for trace in ended)
        return supply.settle(harvest, fresh, step), tokens

    def grade(self, step: int, traces: list[Trace]) -> Rollout:
        """Verdicts of this replica's responses, and the records of everybody's. Of a tensor-parallel group one rank
        judges. Collective.
        """
        if not self.rig.is_leader:
            return Rollout([], gather_graded([]))
        prompts = self.supply.prompts
        texts = [self.tokenizer.decode(trace.response_ids.tolist(), skip_special_tokens=True) for trace in traces]
        verdicts = self.scorer.score([(prompts[trace.prompt_key], text) for trace, text in zip(traces, texts)])
        judged = [
            Judged(prompts[trace.prompt_key], trace, text, verdict)
            for trace, text, verdict in zip(traces, texts, verdicts)
        ]
        if self.rl.save_debug_rollout_data is not None:
            dump(self.rl.save_debug_rollout_data, step, self.rank, judged)
        too_long = overlong(
            [len(trace.response_ids) for trace in traces],
            self.rollout.rollout_max_response_len,
            self.rl.overlong_margin,
        )
        return Rollout(
            judged,
            gather_graded(
                [
                    self._record(index, trace, verdict, bool(cut))
                    for index, (trace, verdict, cut) in enumerate(zip(traces, verdicts, too_long))
                ]
            ),
        )

    def _record(self, index: int, trace: Trace, verdict: Verdict, too_long: bool) -> Graded:
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
            judge_failed=verdict.reason in (CRASH, TIMEOUT),
            load=Load(item.group, item.shared_length, item.own_length),
            num_targets=item.views.num_targets,
            continued=(trace.prompt_key, trace.sample) in self.supply.continued,
            stale=int((lag > 0).sum()),
            version_lag=int(lag.sum()),
            largest_lag=int(lag.max(initial=0)),
        )
