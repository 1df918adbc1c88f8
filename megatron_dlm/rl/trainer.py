"""The TraceRL loop, top to bottom: rollout, reward, advantage, old log-probabilities, update, refit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron_dlm.config.errors import TrainingError
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import check_budget
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rewards.base import Scorer
from megatron_dlm.rl.advantages import group_advantages, in_band
from megatron_dlm.rl.collect import Collector
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.metrics import console, learned_metrics, rollout_metrics, staleness_metrics
from megatron_dlm.rl.objective import PolicyObjective
from megatron_dlm.rl.samples import readable
from megatron_dlm.rl.supply import Supply
from megatron_dlm.rl.turns import Turns
from megatron_dlm.rl.update import (
    UpdateSettings,
    build_rows,
    fetch,
    old_logprobs,
    plan_updates,
    trace_item,
    update_policy,
)
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training.pace import Pace
from megatron_dlm.training.report import Report, Stopwatch
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState

STAGE = "tracerl"


class TraceRLTrainer:
    """Improves `state` by TraceRL; `step_index` counts finished RL steps.

    Args:
        progress: of the run that is resumed, as `progress` returned it; None for a new one.
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
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        self.session, self.state, self.rig = session, state, rig
        self.rl, self.rollout_config, self.seed = rl, rollout, seed
        self.turns = Turns(state, rig, rl)
        progress = progress or {}
        self.step_index = progress.get("rl_step", 0)
        rig.engine.weight_version = progress.get("weight_version", rig.engine.weight_version)
        self.sampling = rig.sampling(rollout)
        self.supply = Supply(prompts, STAGE, seed, rig, rollout, self.sampling, progress)
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
        self.collector = Collector(
            rig,
            self.supply,
            scorer,
            session.tokenizer,
            session.groups.rank,
            rl,
            rollout,
            self.sampling,
            seed,
            self._item,
        )

    def _item(self, trace: Trace) -> Item:
        return trace_item(trace, self.settings.grid, self.settings.shrinkage, self._oldest_version())

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

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs besides the TrainState and the supply's kept groups; JSON can hold it."""
        version = self.rig.engine.weight_version
        return {"rl_step": self.step_index, "weight_version": version, **self.supply.progress()}

    def step(self, report: Report) -> dict[str, float]:
        """One RL step. Collective. Returns its metrics; all but this rank's seconds and bytes (perf/, memory/) are the
        same on every rank.
        """
        watch = Stopwatch()
        during = partial(self.turns.phase, watch=watch)
        self.turns.ledger.begin_step()
        with during("rollout"):
            traces, generated = self.collector.generate(self.step_index, report)
        with watch.phase("reward_time"):
            rollout = self.collector.grade(self.step_index, traces)
        learned, advantages = self._advantages(rollout.graded)
        metrics = rollout_metrics(rollout.graded) | learned_metrics(advantages, len(rollout.graded))
        if self.rollout_config.over_sampling_batch_size is not None:
            metrics |= staleness_metrics(rollout.graded, self.supply.aborted)
        if report.samples is not None and self.rl.log_samples:
            shown = readable(self.step_index + 1, rollout.judged, rollout.graded, advantages, self.rl.log_samples)
            report.keep_samples(shown)
        if learned:
            with during("old_logprobs"):
                prepared = self._prepare(learned, advantages, rollout.traces)
            learning_rate = self.state.learning_rate()
            with during("train"):
                update = update_policy(self.state, prepared, self.session.vocabulary, self.settings)
            metrics |= {f"train/{name}": value for name, value in update.items()} | {"train/lr": learning_rate}
            with during("update_weights"):
                refit = self.rig.refit()
            metrics |= {"perf/refit_bytes": float(refit.moved), "perf/refit_shared_bytes": float(refit.shared)}
            trained = self.session.groups.dp_size * sum(len(rows) * length for rows, length in prepared)
            metrics["perf/train_tokens_per_sec"] = trained / watch.seconds["train_time"]
        self.step_index += 1
        metrics |= {f"perf/{name}": seconds for name, seconds in watch.seconds.items()} | self.turns.ledger.metrics()
        metrics["perf/step_time"] = sum(watch.seconds.values())
        generated = sum(gather_objects(generated if self.rig.is_leader else 0))
        metrics["perf/rollout_tokens_per_sec"] = generated / watch.seconds["rollout_time"]
        return metrics

    def _oldest_version(self) -> int:
        """Of the weights whose tokens this step learns; asked for before the weights are updated."""
        return self.rig.engine.weight_version if self.rollout_config.mask_offpolicy_in_partial_rollout else 0

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
            values = group_advantages(rewards, self.rl.normalize_advantages_by_std)
            for record, value in zip(members, values):
                if record.num_targets:  # 0 where all is masked
                    learned.append(record)
                    advantages[record.group, record.sample] = float(value)
        return learned, advantages

    def _prepare(self, learned: list[Graded], advantages: dict[tuple[str, int], float], traces: list[Trace]):
        """Rows of all updates of this step, with the old policy's log-probabilities: computed before the first update
        changes the weights.
        """
        groups, words = self.session.groups, self.session.tokenizer
        settings = dataclasses.replace(self.settings, oldest_version=self._oldest_version())
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

    def run(
        self,
        report: Report,
        pace: Pace,
        evaluate: Callable[[int], dict[str, float]] | None,
        log_interval: int = 1,
        log_memory: bool = False,
    ) -> None:
        """Run to --num-rollout steps, or as long as `pace` lets it.

        Args:
            evaluate: called with 0 before the first step and with its number after each; its metrics are recorded.
            log_interval: steps between console lines.
            log_memory: say who holds how much memory after each phase.

        Raises:
            TrainingError: --max-empty-steps; the run is saved then.
        """
        last, empty = self.rl.num_rollout, 0
        self.turns.ledger.say = report.say if log_memory else None
        if evaluate is not None and self.step_index == 0:
            metrics = evaluate(0)
            report.record(0, metrics)
            report.iteration(0, last, console(metrics))
        with pace:
            while self.step_index < last:
                metrics = self.step(report)
                if evaluate is not None:
                    watch = Stopwatch()
                    with watch.phase("perf/eval_time"):
                        found = evaluate(self.step_index)
                    metrics |= found and found | watch.seconds
                report.record(self.step_index, metrics)
                if self.step_index % log_interval == 0 or self.step_index == last:
                    report.iteration(self.step_index, last, console(metrics))
                empty = 0 if metrics["rollout/learned_ratio"] else empty + 1
                if pace.after(self.step_index) or empty == self.rl.max_empty_steps:
                    break
            pace.finish(self.step_index)
        if empty == self.rl.max_empty_steps:
            raise self._nothing_to_learn(empty, metrics["rollout/raw_reward"])

    def _nothing_to_learn(self, steps: int, accuracy: float) -> TrainingError:
        rl = self.rl
        return TrainingError(
            f"No group of responses was left to learn from in {steps} RL steps in a row (right answers in the last: "
            f"{accuracy:.1%}; a group needs different rewards and between {rl.min_group_accuracy:.0%} and "
            f"{rl.max_group_accuracy:.0%} right answers). Take easier or harder prompts, or widen --min-group-accuracy "
            "and --max-group-accuracy."
        )
