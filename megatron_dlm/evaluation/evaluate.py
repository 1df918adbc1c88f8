"""Accuracy, length and speed of a model on held-out prompts, for each way of unmasking.

The draws of an evaluation are keyed by (seed, prompt, sample, way of unmasking), not by the training step: two
checkpoints are compared on the same uniform numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.parallel.exchange import exchange_objects, gather_objects
from megatron_dlm.rewards.base import Scorer, Verdict
from megatron_dlm.rollout.replicas import Job, requests_for, roll
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.rollout.samples import sample_record
from megatron_dlm.training.report import Report
from megatron_dlm.training.sinks import JsonLines


@dataclass(frozen=True, slots=True)
class Outcome:
    """One judged response: its verdict, tokens, denoising steps, model passes, and whether it was cut at the limit."""

    correct: float
    length: int
    steps: int
    forwards: int
    truncated: bool


def outcome_of(trace: Trace, verdict: Verdict) -> Outcome:
    return Outcome(
        verdict.correct,
        len(trace.response_ids),
        trace.num_steps,
        trace.num_forwards,
        trace.finish_reason == "length",
    )


def summarize(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means over responses; speeds are total tokens over total denoising steps or model passes.

    TraceRL's Table 4 (arXiv 2509.06949) counts denoising steps. Model passes are denoising steps and passes that only
    commit a block, without prefill. This package's engine commits a block within the next denoising step, so for it the
    two speeds are equal; they differ for traces of an engine that commits in a pass of its own.
    """
    column = lambda name: np.array([getattr(outcome, name) for outcome in outcomes], dtype=np.float64)
    tokens = column("length").sum()
    return {
        "accuracy": float(column("correct").mean()),
        "response_len": float(column("length").mean()),
        "tokens_per_step": float(tokens / column("steps").sum()),
        "tokens_per_forward": float(tokens / column("forwards").sum()),
        "truncated_ratio": float(column("truncated").mean()),
        "responses": float(len(outcomes)),
    }


def ways_of(config: EvalConfig) -> dict[str, tuple[str, int | None]]:
    """The (way of unmasking, block) pairs that are evaluated, by the name under which metrics tell them. The block is
    None for that of the rollout, and named only where there are several."""
    blocks = config.eval_block_size or [None]
    name = lambda remasking, block: f"{remasking}-block{block}" if len(blocks) > 1 else remasking
    return {name(way, block): (way, block) for block in blocks for way in config.eval_remasking}


class Evaluator:
    """Evaluates the rig's engine on prompts. Calls are collective over all ranks."""

    def __init__(
        self,
        rig: RolloutRig,
        scorer: Scorer,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        config: EvalConfig,
        rollout: RolloutConfig,
        seed: int,
    ) -> None:
        self.rig, self.scorer, self.tokenizer = rig, scorer, tokenizer
        self.config, self.rollout, self.seed = config, rollout, seed
        self.prompts = list(prompts)[: config.eval_num_prompts]

    def sampling(self, remasking: str, block_size: int | None = None) -> SamplingParams:
        """Those of training rollouts, with what the evaluation has settings of its own for."""
        training, config = self.rig.sampling(self.rollout), self.config
        block = block_size or training.block_size
        return dataclasses.replace(
            training,
            temperature=config.eval_temperature,
            top_k=config.eval_top_k,
            top_p=config.eval_top_p,
            max_new_tokens=config.eval_max_response_len or training.max_new_tokens,
            block_size=block,
            denoising_steps=config.eval_denoising_steps or block,
            remasking=remasking,
            threshold=config.eval_threshold,
            confidence=config.eval_confidence,
            entropy_bound=config.eval_entropy_bound,
        )

    def __call__(self, report: Report, step: int = 0) -> dict[str, float]:
        """Metrics named eval/WAY/NAME, for each way of unmasking asked for; the same on every rank.

        Args:
            step: of the model, for --save-eval-samples.
        """
        metrics = {}
        for way, sampling in self._ways().items():
            traces = self._generate(way, sampling, report)
            texts, verdicts = self._judge(traces) if self.rig.is_leader else ([], [])
            if self.config.save_eval_samples is not None:
                self._keep_samples(step, way, list(zip(traces, texts, verdicts)), report.is_main)
            outcomes = [outcome_of(trace, verdict) for trace, verdict in zip(traces, verdicts)]
            everyone = [outcome for part in gather_objects(outcomes) for outcome in part]
            metrics |= {f"eval/{way}/{name}": value for name, value in summarize(everyone).items()}
        return metrics

    def _ways(self) -> dict[str, SamplingParams]:
        """By name."""
        return {way: self.sampling(remasking, block) for way, (remasking, block) in ways_of(self.config).items()}

    def _generate(self, way: str, sampling: SamplingParams, report: Report) -> list[Trace]:
        """The responses that fell to this replica, in the order of the prompts."""
        samples = self.config.n_samples_per_eval_prompt
        job, name = Job(self.seed, 0, f"eval-{sampling.remasking}"), f"evaluation, {way}"
        group = lambda number: requests_for([self.prompts[number]], samples, sampling, job)
        with report.bar(len(self.prompts) * samples // self.rig.num_replicas, name) as bar:
            traces = roll(self.rig, f"eval-{way}", len(self.prompts), samples, group, progress=bar.update).finished
        place = {prompt.key: number for number, prompt in enumerate(self.prompts)}
        return sorted(traces, key=lambda trace: (place[trace.prompt_key], trace.sample))

    def _judge(self, traces: Sequence[Trace]) -> tuple[list[str], list[Verdict]]:
        by_key = {prompt.key: prompt for prompt in self.prompts}
        texts = [self.tokenizer.decode(trace.response_ids.tolist(), skip_special_tokens=True) for trace in traces]
        return texts, self.scorer.score([(by_key[trace.prompt_key], text) for trace, text in zip(traces, texts)])

    def _keep_samples(self, step: int, way: str, judged: Sequence[tuple[Trace, str, Verdict]], is_main: bool) -> None:
        """--save-eval-samples: the responses of all replicas, in the order of the prompts. Collective."""
        place = {prompt.key: index for index, prompt in enumerate(self.prompts)}
        mine = []
        for trace, text, verdict in judged:
            index = place[trace.prompt_key]
            record = {"step": step, "unmasking": way, **sample_record(self.prompts[index], trace, text, verdict)}
            mine.append(((index, trace.sample), record))
        everyone = exchange_objects({0: mine})
        if is_main:
            with JsonLines(self.config.save_eval_samples) as lines:
                for _, record in sorted(everyone, key=lambda item: item[0]):
                    lines.write(record)
