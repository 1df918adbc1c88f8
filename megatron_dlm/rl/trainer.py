"""The RL loop, top to bottom: rollout, reward, advantage, old log-probabilities, values, updates, refit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.errors import TrainingError
from megatron_dlm.config.objective import with_method
from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.value import ValueConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.planner import check_budget
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rewards.base import Scorer
from megatron_dlm.rl.bands import usable
from megatron_dlm.rl.collect import Collector, Rollout
from megatron_dlm.rl.earnings import Earnings
from megatron_dlm.rl.exchange import Graded, by_group
from megatron_dlm.rl.learner import Learner, Models
from megatron_dlm.rl.methods import TARGET, States
from megatron_dlm.rl.metrics import console, learned_metrics, rollout_metrics, staleness_metrics
from megatron_dlm.rl.rewards import group_earnings
from megatron_dlm.rl.samples import readable
from megatron_dlm.rl.supply import Supply
from megatron_dlm.rl.turns import Turns
from megatron_dlm.rl.update import UpdateSettings, update_settings
from megatron_dlm.rollout.rig import RolloutRig
from megatron_dlm.training import profile
from megatron_dlm.training.pace import Pace
from megatron_dlm.training.report import Report, Stopwatch
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState

STAGE = "tracerl"


class TraceRLTrainer:
    """Improves `state` by RL; `step_index` counts finished RL steps.

    Args:
        progress: of the run that is resumed, as `progress` returned it; None for a new one.
        models: those beside the policy; none by default.
        value, curriculum, reward: their settings; the defaults where they are not given.
        earnings: what is rewarded besides verdicts.
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
        *,
        models: Models | None = None,
        value: ValueConfig | None = None,
        curriculum: CurriculumConfig | None = None,
        reward: RewardConfig | None = None,
        earnings: Earnings | None = None,
    ) -> None:
        self.session, self.state, self.rig = session, state, rig
        self.rl, self.rollout_config, self.seed = with_method(rl), rollout, seed
        self.reward, self.earnings = reward or RewardConfig(), earnings
        models = models or Models(state)
        self.turns = Turns(models, rig, self.rl)
        progress = progress or {}
        self.step_index = progress.get("rl_step", 0)
        rig.engine.weight_version = progress.get("weight_version", rig.engine.weight_version)
        self.sampling = rig.sampling(rollout)
        self.supply = Supply(prompts, STAGE, seed, rig, rollout, self.sampling, progress, curriculum)
        self.states = States.of(self.rl, session.grid.block_size, seed)
        check_budget(self._largest_item(max(len(prompt.token_ids) for prompt in prompts)), rl.max_tokens_per_row)
        self.settings = dataclasses.replace(
            update_settings(self.rl, self.states, self.sampling.policy_temperature),
            loss_chunk_size=session.parallel.loss_chunk_size,
            sees_rollout_states=self._sees_rollout_states(),
        )
        self.learner = Learner(session, models, value or ValueConfig(), seed)
        self.collector = Collector(
            rig,
            self.supply,
            scorer,
            session.tokenizer,
            session.groups.rank,
            self.rl,
            rollout,
            self.sampling,
            seed,
            self._item,
            curriculum,
            earnings,
        )

    def _item(self, trace: Trace) -> Item:
        return self.states.item(trace, self.step_index, self._oldest_version())

    def _sees_rollout_states(self) -> bool:
        block, sampling = self.session.grid.block_size, self.sampling
        same_blocks = not sampling.prefix_cache if block is None else sampling.block_size == block
        exact = self.states.shrinkage == 1 and self.rl.grid_anchor == "absolute"
        return self.states.method.follows_trace and same_blocks and exact

    def _largest_item(self, longest_prompt: int) -> int:
        """Most tokens that have to stand in one row: a text with one of its copies, or with all of those that have one
        ratio together.
        """
        sampling, block = self.sampling, self.session.grid.block_size
        copies = 1 if self.states.method.unit == TARGET else self.states.copies
        if block is None:  # each copy is a whole canvas
            return (longest_prompt + sampling.max_new_tokens) * copies
        # with the rest of its first and last block
        response = sampling.max_new_tokens + 2 * max(block, sampling.block_size)
        return longest_prompt + response + (block if self.states.method.unit == TARGET else response * copies)

    def progress(self) -> dict[str, Any]:
        """What a resumed run needs besides the models and the supply's kept groups; JSON can hold it."""
        version = self.rig.engine.weight_version
        return {"rl_step": self.step_index, "weight_version": version, **self.supply.progress()}

    def step(self, report: Report) -> dict[str, float]:
        """One RL step. Collective. Returns its metrics; all but this rank's seconds and bytes (perf/, memory/) are the
        same on every rank.
        """
        watch = Stopwatch()
        during = partial(self.turns.phase, watch=watch)
        profile.begin_step(self.step_index)
        self.turns.ledger.begin_step()
        rollout, generated, metrics = self.collector.collect(
            self.step_index, report, partial(during, "rollout"), partial(self.turns.judging, watch)
        )
        learned, advantages = self._advantages(rollout.candidates)
        metrics |= rollout_metrics(rollout.graded) | learned_metrics(advantages, len(rollout.graded))
        if self.rollout_config.over_sampling_batch_size is not None:
            metrics |= staleness_metrics(rollout.graded, self.supply.aborted)
        if report.samples is not None and self.rl.log_samples:
            shown = readable(self.step_index + 1, rollout.judged, rollout.graded, advantages, self.rl.log_samples)
            report.keep_samples(shown)
        if learned:
            metrics |= self._learn(rollout, learned, advantages, during, watch)
        self.step_index += 1
        metrics |= {f"perf/{name}": seconds for name, seconds in watch.seconds.items()} | self.turns.ledger.metrics()
        metrics["perf/step_time"] = sum(watch.seconds.values())
        generated = sum(gather_objects(generated if self.rig.is_leader else 0))
        metrics["perf/rollout_tokens_per_sec"] = generated / watch.seconds["rollout_time"]
        return metrics

    def _learn(
        self,
        rollout: Rollout,
        learned: list[Graded],
        advantages: dict[tuple[str, int], float],
        during: Callable,
        watch: Stopwatch,
    ) -> dict[str, float]:
        """Updates of all models that learn in this step, and the new weights for the engine."""
        settings = self._settings_of(rollout, learned)
        with during("old_logprobs"):
            tokens = None if self.earnings is None else self.earnings.token_rewards(rollout.graded)
            prepared = self.learner.prepare(learned, advantages, rollout.traces, settings, tokens)
        metrics = self.learner.update(prepared, settings, during, self.rl.reset_optimizer)
        if not self.learner.policy_waits(self.step_index):
            with during("update_weights"):
                refit = self.rig.refit()
            metrics |= {"perf/refit_bytes": float(refit.moved), "perf/refit_shared_bytes": float(refit.shared)}
        seconds = sum(watch.seconds.get(name, 0.0) for name in ("train_time", "train_value_time"))
        groups = self.session.groups
        real = sum(int((row.row.layout.group >= 0).sum()) for one in prepared for row in one.rows)
        real = sum(gather_objects(real, groups.dp))
        return metrics | {"perf/train_tokens_per_sec": real / seconds, "train/tokens": float(real)}

    def _settings_of(self, rollout: Rollout, learned: Sequence[Graded]) -> UpdateSettings:
        """The settings of this step's updates."""
        rl = self.rl
        if rl.global_batch_size is not None:
            updates = -(-len(learned) // rl.global_batch_size)
        else:  # a step that learned little takes fewer updates, not smaller ones than a group
            updates = min(rl.num_steps_per_rollout, max(1, len(learned) // self.rollout_config.n_samples_per_prompt))
        longest = self.rollout_config.rollout_max_response_len
        if rl.loss_aggregation == "longest":
            longest = max(record.length for record in learned)
        return dataclasses.replace(
            self.settings,
            num_updates=updates,
            longest=longest,
            step=self.step_index,
            oldest_version=self._oldest_version(),
        )

    def _oldest_version(self) -> int:
        """Of the weights whose tokens this step learns; asked for before the weights are updated."""
        return self.rig.engine.weight_version if self.rollout_config.mask_offpolicy_in_partial_rollout else 0

    def _advantages(self, graded: Sequence[Graded]) -> tuple[list[Graded], dict[tuple[str, int], float]]:
        """The responses to learn from, and their advantages. Groups that have nothing to teach are left out; a teacher
        alone has something to say of all."""
        learned, advantages = [], {}
        for members in by_group(graded).values():
            if self.rl.policy_loss_coef and not usable(members, self.rl, self.reward):
                continue
            values = group_earnings(members, self.reward, self.rl.normalize_advantages_by_std)
            for record, value in zip(members, values):
                if record.num_targets:  # 0 where all is masked
                    learned.append(record)
                    advantages[record.group, record.sample] = float(value)
        return learned, advantages

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
                if pace.after(self.step_index, metrics) or empty == self.rl.max_empty_steps:
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
