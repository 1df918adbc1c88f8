"""The TraceRL loop, top to bottom: rollout, reward, advantage, old log-probabilities, update, refit."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.sampler import EpochSampler
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Load, check_budget
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.parallel.exchange import agreed
from megatron_dlm.rewards.base import CRASH, TIMEOUT, Scorer, Verdict
from megatron_dlm.rl.advantages import group_advantages, in_band, overlong
from megatron_dlm.rl.exchange import Graded, gather_graded
from megatron_dlm.rl.objective import PolicyObjective
from megatron_dlm.rl.update import (
    UpdateSettings,
    build_rows,
    fetch,
    old_logprobs,
    plan_updates,
    trace_item,
    update_policy,
)
from megatron_dlm.rollout.replicas import Job, generate, requests_for
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training.report import Report, Stopwatch
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState


@dataclass(frozen=True, slots=True)
class Rollout:
    """The responses of one RL step: the traces that this rank holds, and the records of all."""

    traces: list[Trace]
    graded: list[Graded]


class TraceRLTrainer:
    """Improves `state` by TraceRL; `step_index` counts finished RL steps, and is all that a resumed run needs to know.
    """

    def __init__(
        self,
        session: Session,
        state: TrainState,
        rig: RolloutRig,
        scorer: Scorer,
        prompts: list[Prompt],
        rl: RLConfig,
        rollout: RolloutConfig,
        seed: int,
        step_index: int = 0,
    ) -> None:
        self.session, self.state, self.rig, self.scorer = session, state, rig, scorer
        self.rl, self.rollout_config, self.seed, self.step_index = rl, rollout, seed, step_index
        self.sampler = EpochSampler(prompts, seed)
        self.sampling = rig.sampling(rollout)
        check_budget(self._largest_item(max(len(prompt.token_ids) for prompt in prompts)), rl.max_tokens_per_row)
        self.settings = UpdateSettings(
            objective=PolicyObjective(
                rl.eps_clip, rl.eps_clip if rl.eps_clip_high is None else rl.eps_clip_high, rl.kl_loss_coef
            ),
            temperature=self.sampling.policy_temperature,
            aggregation=rl.loss_aggregation,
            max_response_len=rollout.rollout_max_response_len,
            num_updates=rl.num_steps_per_rollout or 0,
            max_tokens_per_row=rl.max_tokens_per_row,
            grid=Grid(session.model.block_size, rl.grid_anchor),
            shrinkage=rl.shrinkage,
            use_rollout_logprobs=rl.use_rollout_logprobs,
        )

    def _largest_item(self, longest_prompt: int) -> int:
        """Most tokens that a trace can take in a row: its text, and a noisy copy of each block per denoising step of
        it.
        """
        sampling, block = self.sampling, self.session.model.block_size
        response = sampling.max_new_tokens + 2 * max(
            block, sampling.block_size
        )  # with the rest of its first and last block
        steps = sampling.denoising_steps if sampling.block_size == block else block
        return longest_prompt + response + response * -(-steps // self.rl.shrinkage)

    def step(self, report: Report) -> dict[str, float]:
        """One RL step. Collective. Returns its metrics; all but this rank's seconds (perf/) are the same on every rank.
        """
        watch = Stopwatch()
        prompts = self._prompts()
        with watch.phase("rollout_time"):
            traces = self._generate(prompts, report)
        with watch.phase("reward_time"):
            rollout = self._grade({prompt.key: prompt for prompt in prompts}, traces)
        learned, advantages = self._advantages(rollout.graded)
        metrics = rollout_metrics(rollout.graded) | {"rollout/learned_ratio": len(learned) / len(rollout.graded)}
        if learned:
            with watch.phase("old_logprobs_time"):
                prepared = self._prepare(learned, advantages, rollout.traces)
            learning_rate = self.state.learning_rate()
            with watch.phase("train_time"):
                update = update_policy(self.state, prepared, self.session.vocabulary, self.settings)
            metrics |= {f"train/{name}": value for name, value in update.items()} | {"train/lr": learning_rate}
            with watch.phase("update_weights_time"):
                self.rig.refit()
        self.step_index += 1
        metrics |= {f"perf/{name}": seconds for name, seconds in watch.seconds.items()}
        metrics["perf/step_time"] = sum(watch.seconds.values())
        metrics["perf/rollout_tokens_per_sec"] = (
            sum(graded.length for graded in rollout.graded) / watch.seconds["rollout_time"]
        )
        return metrics

    def _prompts(self) -> list[Prompt]:
        """The prompts of this step, all different: an epoch's last few, too few for a step, are left out (others in
        each epoch).
        """
        count, size = self.rollout_config.rollout_batch_size, len(self.sampler)
        epoch, place = divmod(self.step_index, size // count)
        return self.sampler.take(epoch * size + place * count, count)

    def _generate(self, prompts: list[Prompt], report: Report) -> list[Trace]:
        """This replica's share of the responses."""
        mine = prompts[self.rig.replica :: self.rig.num_replicas]
        requests = requests_for(
            mine, self.rollout_config.n_samples_per_prompt, self.sampling, Job(self.seed, self.step_index)
        )
        with report.bar(len(requests), f"rollout {self.step_index}") as bar:
            return generate(self.rig.engine, requests, bar.update)

    def _grade(self, prompts: dict[str, Prompt], traces: list[Trace]) -> Rollout:
        """Verdicts of this replica's responses, and the records of everybody's. Of a tensor-parallel group one rank
        judges.
        """
        if not self.rig.is_leader:
            return Rollout([], gather_graded([]))
        decode = self.session.tokenizer.decode
        texts = [decode(trace.response_ids.tolist(), skip_special_tokens=True) for trace in traces]
        verdicts = self.scorer.score([(prompts[trace.prompt_key], text) for trace, text in zip(traces, texts)])
        self._dump(prompts, traces, texts, verdicts)
        too_long = overlong(
            [len(trace.response_ids) for trace in traces],
            self.rollout_config.rollout_max_response_len,
            self.rl.overlong_margin,
        )
        return Rollout(
            traces,
            gather_graded(
                [
                    self._record(index, trace, verdict, bool(cut))
                    for index, (trace, verdict, cut) in enumerate(zip(traces, verdicts, too_long))
                ]
            ),
        )

    def _record(self, index: int, trace: Trace, verdict: Verdict, too_long: bool) -> Graded:
        item = trace_item(trace, self.settings.grid, self.settings.shrinkage)
        return Graded(
            group=trace.prompt_key,
            sample=trace.sample,
            owner=self.session.groups.rank,
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
        )

    def _advantages(self, graded: list[Graded]) -> tuple[list[Graded], dict[tuple[str, int], float]]:
        """The responses to learn from, and their advantages. Groups outside the accuracy band are left out."""
        groups: dict[str, list[Graded]] = {}
        for record in graded:
            groups.setdefault(record.group, []).append(record)
        learned, advantages = [], {}
        for members in groups.values():
            rewards = [record.reward for record in members]
            if not in_band(rewards, self.rl.min_group_accuracy, self.rl.max_group_accuracy) or min(rewards) == max(
                rewards
            ):
                continue
            learned += members
            values = group_advantages(rewards, self.rl.normalize_advantages_by_std)
            advantages |= {(record.group, record.sample): float(value) for record, value in zip(members, values)}
        return learned, advantages

    def _prepare(self, learned: list[Graded], advantages: dict[tuple[str, int], float], traces: list[Trace]):
        """Rows of all updates of this step, with the old policy's log-probabilities: computed before the first update
        changes the weights.
        """
        groups, words = self.session.groups, self.session.tokenizer
        settings = self.settings
        if self.rl.global_batch_size is not None:
            settings = dataclasses.replace(settings, num_updates=-(-len(learned) // self.rl.global_batch_size))
        else:  # a step that learned little takes fewer updates, not smaller ones than a group
            most = max(1, len(learned) // self.rollout_config.n_samples_per_prompt)
            settings = dataclasses.replace(settings, num_updates=min(settings.num_updates, most))
        updates = plan_updates(learned, settings, groups, stream(self.seed, "partition", self.step_index))
        prepared = []
        for (records, plan), mine in zip(updates, fetch(updates, traces, groups)):
            rows = build_rows(records, plan, mine, advantages, settings, groups.dp_rank, words.mask_id, words.pad_id)
            prepared.append(
                (old_logprobs(self.state, rows, plan.length, self.session.vocabulary, settings), plan.length)
            )
        return prepared

    def _dump(self, prompts: dict[str, Prompt], traces: list[Trace], texts: list[str], verdicts: list[Verdict]) -> None:
        """--save-debug-rollout-data: this replica's responses as JSON lines."""
        if self.rl.save_debug_rollout_data is None:
            return
        folder = Path(self.rl.save_debug_rollout_data)
        folder.mkdir(parents=True, exist_ok=True)
        with open(
            folder / f"step_{self.step_index:06d}_rank_{self.session.groups.rank:04d}.jsonl", "w", encoding="utf-8"
        ) as file:
            for trace, text, verdict in zip(traces, texts, verdicts):
                prompt = prompts[trace.prompt_key]
                file.write(
                    json.dumps(
                        {
                            "question": prompt.question,
                            "ground_truth": prompt.ground_truth,
                            "response": text,
                            "correct": verdict.correct,
                            "reason": verdict.reason,
                            "token_ids": trace.response_ids.tolist(),
                            "step_map": trace.steps.tolist(),
                            "finish_reason": trace.finish_reason,
                        }
                    )
                    + "\n"
                )

    def run(
        self,
        report: Report,
        save: Callable[[int, bool], None],
        evaluate: Callable[[int], dict[str, float]] | None,
        log_interval: int = 1,
    ) -> None:
        """Run to --num-rollout steps, or to --exit-duration-in-mins.

        Args:
            save: save(step, force) writes a checkpoint when one is due, always with `force`.
            evaluate: called with 0 before the first step and with its number after each; its metrics are recorded.
            log_interval: steps between console lines.
        """
        began, last = time.perf_counter(), self.rl.num_rollout
        if evaluate is not None and self.step_index == 0:
            metrics = evaluate(0)
            report.record(0, metrics)
            report.iteration(0, last, _console(metrics))
        while self.step_index < last:
            metrics = self.step(report)
            if evaluate is not None:
                metrics |= evaluate(self.step_index)
            report.record(self.step_index, metrics)
            if self.step_index % log_interval == 0 or self.step_index == last:
                report.iteration(self.step_index, last, _console(metrics))
            save(self.step_index, False)
            minutes, limit = (time.perf_counter() - began) / 60, self.rl.exit_duration_in_mins
            if limit is not None and agreed(minutes >= limit):
                report.say(f"Stopping after {minutes:.1f} minutes, at RL step {self.step_index}.")
                break
        save(self.step_index, True)


def rollout_metrics(graded: list[Graded]) -> dict[str, float]:
    """Means over all responses of a step."""
    mean = lambda values: float(np.mean(list(values)))
    tokens = sum(record.length for record in graded)
    return {
        "rollout/raw_reward": mean(record.correct for record in graded),
        "rollout/reward": mean(record.reward for record in graded),
        "rollout/response_len/mean": mean(record.length for record in graded),
        "rollout/truncated_ratio": mean(record.truncated for record in graded),
        "rollout/overlong_ratio": mean(record.overlong for record in graded),
        "rollout/judge_failed_ratio": mean(record.judge_failed for record in graded),
        "rollout/tokens_per_step": tokens / sum(record.steps for record in graded),
        "rollout/tokens_per_forward": tokens / sum(record.forwards for record in graded),
    }


def _console(metrics: dict[str, float]) -> dict[str, float | str]:
    shown = {
        "accuracy": "rollout/raw_reward",
        "reward": "rollout/reward",
        "response len": "rollout/response_len/mean",
        "overlong": "rollout/overlong_ratio",
        "tokens/step": "rollout/tokens_per_step",
        "learned": "rollout/learned_ratio",
        "loss": "train/loss",
        "k3": "train/k3",
        "clipfrac": "train/pg_clipfrac",
        "entropy": "train/entropy",
        "grad norm": "train/grad_norm",
        "rollout (s)": "perf/rollout_time",
        "train (s)": "perf/train_time",
        "step (s)": "perf/step_time",
    }
    fields: dict[str, float | str] = {name: metrics[key] for name, key in shown.items() if key in metrics}
    return fields | {key: value for key, value in metrics.items() if key.startswith("eval/") and "accuracy" in key}
