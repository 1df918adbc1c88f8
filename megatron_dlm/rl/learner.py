"""What an RL step does with responses once it knows their rewards: rows, old log-probabilities, values, updates.

Up to four models live in the process: the policy, its value model, a frozen reference that the KL penalty holds on to,
and a frozen teacher. All of them read the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_dlm import platform
from megatron_dlm.config.value import ValueConfig, learns_in
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rl.earnings import TokenRewards
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.gae import learned_steps, outcome_rewards
from megatron_dlm.rl.rows import RLRow, build_rows
from megatron_dlm.rl.teacher import Teacher
from megatron_dlm.rl.update import (
    UpdateSettings,
    fetch,
    plan_updates,
    update_policy,
    with_old_logprobs,
    with_reference,
)
from megatron_dlm.rl.value import Rewarded, ValueRow, ValueSettings, token_advantages, update_value, values_of
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState, forget_optimizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """One update: this rank's rows, their length, and the same rows for the value model."""

    rows: list[RLRow]
    length: int
    value_rows: list[ValueRow]


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a run; all but the policy may be missing."""

    policy: TrainState
    value: TrainState | None = None
    reference: TrainState | None = None
    teacher: Teacher | None = None


class Learner:
    """Updates the models of a run.

        prepared = learner.prepare(records, advantages, traces, settings)
        metrics = learner.update(prepared, settings, during)

    Args:
        value: of the advantages over denoising steps; without a value model, values are 0.
    """

    def __init__(self, session: Session, models: Models, value: ValueConfig, seed: int) -> None:
        self.session, self.models, self.value, self.seed = session, models, value, seed
        self.value_settings = ValueSettings(value.value_eps_clip, value.gamma, value.gae_lambda)

    def prepare(
        self,
        learned: Sequence[Graded],
        advantages: Mapping[tuple[str, int], float],
        traces: Sequence[Trace],
        settings: UpdateSettings,
        token_rewards: TokenRewards | None = None,
    ) -> list[Prepared]:
        """All updates of a step, before the first of them changes any weights. Collective.

        Args:
            learned: records of the responses to learn from; advantages: of each, by (group, sample).
            traces: that this rank holds.
            token_rewards: rewards of single tokens, which then make the advantages in the place of those given.
        """
        session = self.session
        groups, words, sharing = session.groups, session.tokenizer, session.sharing
        settings = dataclasses.replace(settings, rows_multiple=session.rows_multiple, row_multiple=session.row_multiple)
        if self.models.value is not None or token_rewards is not None:  # computed from all tokens of a response
            settings = dataclasses.replace(settings, together=True)
        updates = plan_updates(learned, settings, groups, stream(self.seed, "partition", settings.step))
        prepared = []
        for number, ((records, plan), mine) in enumerate(zip(updates, fetch(updates, traces, groups))):
            place = (groups.data_rank, words.mask_id, words.pad_id, sharing)
            rows, length = build_rows(records, plan, mine, advantages, settings, *place), sharing.length(plan.length)
            value_rows: list[ValueRow] = []
            if self.models.value is not None or token_rewards is not None:
                rewarded = self._rewarded(records, mine, advantages, settings, token_rewards)
                rows, value_rows = self._with_values(rows, length, rewarded)
            if self.policy_waits(settings.step):
                prepared.append(Prepared(rows, length, value_rows))
                continue
            # The weights of the first update are still those of the old policy: it needs no pass of its own.
            if number or settings.old_logprobs != "recomputed":
                rows = with_old_logprobs(self.models.policy, rows, length, self.session.vocabulary, settings)
            if self.models.reference is not None:
                rows = with_reference(self.models.reference, rows, length, self.session.vocabulary, settings)
            if self.models.teacher is not None:
                rows = self.models.teacher.with_hidden(rows, length, mine, words.mask_id, words.pad_id)
            prepared.append(Prepared(rows, length, value_rows))
        return prepared

    def update(
        self, prepared: Sequence[Prepared], settings: UpdateSettings, during: Callable, anew: bool = False
    ) -> dict[str, float]:
        """Optimizer steps of the models that learn in this step. Collective.

        Args:
            during: makes the context of a phase from its name (rl/turns.py).
            anew: each model begins anew with its optimizer.
        """
        metrics: dict[str, float] = {}
        policy, value = self.models.policy, self.models.value

        def learn_policy() -> None:
            rate = policy.learning_rate()
            with during("train"):
                if anew:
                    forget_optimizer(policy)
                rows = [(one.rows, one.length) for one in prepared]
                found = update_policy(policy, rows, self.session.vocabulary, settings, self.models.teacher)
            metrics.update({f"train/{name}": number for name, number in found.items()} | {"train/lr": rate})

        def learn_value() -> None:
            with during("train_value"):
                if anew:
                    forget_optimizer(value)
                found = update_value(value, [(one.value_rows, one.length) for one in prepared], self.value_settings)
            metrics.update({f"value/{name}": number for name, number in found.items()})

        turns = [] if self.policy_waits(settings.step) else [learn_policy]
        if value is not None and learns_in(self.value, settings.step):
            turns.insert(0 if self.value.value_order == "before" else len(turns), learn_value)
        for turn in turns:
            turn()
        return metrics

    def policy_waits(self, step: int) -> bool:
        """Whether the value model alone is updated in an RL step."""
        return self.models.value is not None and step < self.value.value_warmup_steps

    def _rewarded(
        self,
        records: Sequence[Graded],
        traces: Mapping[int, Trace],
        advantages: Mapping[tuple[str, int], float],
        settings: UpdateSettings,
        token_rewards: TokenRewards | None,
    ) -> dict[int, Rewarded]:
        """Of the responses in this rank's rows, by index into `records`. An outcome is rewarded with the response's
        advantage, so that values are about what is left of a prompt's difficulty."""
        states, found = settings.states, {}
        for index, trace in traces.items():
            steps = learned_steps(trace, states.grid, states.shrinkage)
            trainable = states.learned(trace, settings.oldest_version)
            record = records[index]
            if token_rewards is None:
                rewards = outcome_rewards(steps, trainable, advantages[record.group, record.sample])
            else:
                rewards = token_rewards(record, trace, steps, trainable)
            found[index] = Rewarded(rewards, steps, trainable)
        return found

    def _with_values(
        self, rows: list[RLRow], length: int, rewarded: Mapping[int, Rewarded]
    ) -> tuple[list[RLRow], list[ValueRow]]:
        plain = [row.row for row in rows]
        if self.models.value is None:
            old = [torch.zeros(len(row.targets.slot), dtype=torch.float64) for row in plain]
        else:
            old = values_of(self.models.value, plain, length)
        groups = self.session.groups
        pairs = token_advantages(plain, old, rewarded, self.value_settings, groups.cp if groups.cp_size > 1 else None)
        device = platform.device()
        rows = [dataclasses.replace(row, advantage=pair[0].to(device)) for row, pair in zip(rows, pairs)]
        if self.models.value is None:
            return rows, []
        known = old if old is not None else [pair[0] for pair in pairs]  # unused where no loss is computed
        return rows, [
            ValueRow(row.row, value.to(device), pair[1].to(device), row.weight)
            for row, value, pair in zip(rows, known, pairs)
        ]
