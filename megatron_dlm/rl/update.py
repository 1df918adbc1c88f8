"""One RL step's updates of the policy: plan, fetch traces, old log-probabilities, optimizer steps.

Everything is planned from `Graded` records before any trace moves; the traces of all updates of the step then move in
one exchange.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.config.rl import RLConfig
from megatron_dlm.diffusion.planner import Plan, pack_parts, partition, row_multiple
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.model.head import target_policy
from megatron_dlm.model.policy import Vocabulary, by_chunks, divergence, entropy, label_logprobs, policy_scores
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.rl.exchange import Graded, deliver
from megatron_dlm.rl.methods import States
from megatron_dlm.rl.objective import PolicyObjective
from megatron_dlm.rl.rows import RLRow
from megatron_dlm.rl.teacher import Teacher
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import forward_only, train_step

MISMATCH = "train_rollout_logprob_abs_diff"
_PER_UPDATE = ("loss", "pg_loss", "kl_loss", "entropy_loss", "distill_loss")  # sums with final weights
_PER_UNIT = ("advantage", "advantage_squared", "ratio", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "k3", "ref_k3")


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """What the updates of a step are told of the configuration.

    Attributes:
        objective: the loss. temperature: of the policy, as it was sampled.
        states: which states of a response are learned.
        aggregation, longest: `unit_weights`. kl_slice_sum: the penalty is summed within slices, whatever the
            aggregation.
        num_updates: optimizer steps for this RL step. max_tokens_per_row: row budget. shuffle: of responses.
        old_logprobs: 'recomputed', 'rollout' or 'current' (config/objective.py).
        entropy_coef: weight of the entropy. distill_coef, distill_kl: of the divergence from the teacher.
        bf16_logprobs: whether log-probabilities are computed in bfloat16.
        loss_chunk_size: of model/head.py; 0 for a table of the logits of all targets.
        sees_rollout_states: whether tokens are learned in the very states in which the rollout decided them.
        step: of RL. oldest_version: of the weights whose tokens are learned.
        together: a response stays on one data rank. rows_multiple: of the number of rows (Session.rows_multiple).
        row_multiple: of their length (Session.row_multiple); 0 for that of full precision.
    """

    objective: PolicyObjective
    temperature: float
    states: States
    aggregation: str
    longest: int
    num_updates: int
    max_tokens_per_row: int
    old_logprobs: str = "recomputed"
    kl_slice_sum: bool = False
    shuffle: bool = True
    entropy_coef: float = 0.0
    distill_coef: float = 0.0
    distill_kl: str = "reverse"
    bf16_logprobs: bool = False
    loss_chunk_size: int = 0
    sees_rollout_states: bool = True
    step: int = 0
    oldest_version: int = 0
    together: bool = False
    rows_multiple: int = 1
    row_multiple: int = 0

    @property
    def head_chunk(self) -> int:
        """`loss_chunk_size`, or 0 where the table is needed: rounded log-probabilities, a divergence from a teacher."""
        return 0 if self.bf16_logprobs or self.distill_coef else self.loss_chunk_size


def update_settings(rl: RLConfig, states: States, temperature: float) -> UpdateSettings:
    """What the configuration says of updates; what changes from step to step is filled in by the trainer.

    Args:
        rl: with the fields of its method.
    """
    objective = PolicyObjective(
        eps_clip=rl.eps_clip,
        eps_clip_high=rl.eps_clip if rl.eps_clip_high is None else rl.eps_clip_high,
        kl_coef=rl.kl_loss_coef,
        kl_type=rl.kl_loss_type,
        eps_clip_c=rl.eps_clip_c,
        policy_coef=rl.policy_loss_coef,
        tis=(rl.tis_clip_low, rl.tis_clip) if rl.use_tis else None,
    )
    return UpdateSettings(
        objective,
        temperature,
        states,
        aggregation=rl.loss_aggregation,
        longest=0,
        num_updates=0,
        max_tokens_per_row=rl.max_tokens_per_row,
        old_logprobs=rl.old_logprobs,
        kl_slice_sum=rl.kl_aggregation == "slice_sum",
        shuffle=rl.shuffle_responses,
        entropy_coef=rl.entropy_coef,
        distill_coef=rl.distill_coef,
        distill_kl=rl.distill_kl,
        bf16_logprobs=rl.bf16_logprobs,
    )


def plan_updates(
    records: Sequence[Graded], settings: UpdateSettings, groups: Groups, stream: int
) -> list[tuple[list[Graded], Plan]]:
    """The updates of this RL step: for each its records and its rows. The same on every rank."""
    updates = []
    for members in partition(len(records), settings.num_updates, stream if settings.shuffle else None):
        chosen = [records[index] for index in members]
        loads = [graded.parts or (graded.load,) for graded in chosen]
        plan = pack_parts(
            loads,
            settings.max_tokens_per_row,
            groups.data_size,
            settings.row_multiple or row_multiple(groups.tp_size),
            settings.together,
            settings.rows_multiple,
        )
        updates.append((chosen, plan))
    return updates


def fetch(updates: list[tuple[list[Graded], Plan]], traces: Sequence[Trace], groups: Groups) -> list[dict[int, Trace]]:
    """For each update, the traces that this rank's rows need, by index into the update's records. Collective."""
    needs = [
        list(dict.fromkeys(index for row in plan.ranks[rank] for index in row))
        for rank in range(groups.data_size)
        for _, plan in updates
    ]
    per_update = len(updates)
    data_ranks = gather_objects(groups.data_rank)
    wanted = [
        [updates[u][0][index] for u in range(per_update) for index in needs[data_rank * per_update + u]]
        for data_rank in data_ranks
    ]
    received = iter(deliver(wanted, traces, groups.rank))
    return [{index: next(received) for index in needs[groups.data_rank * per_update + u]} for u in range(per_update)]


def _logprobs(logits: Tensor, labels: Tensor, vocabulary: Vocabulary, settings: UpdateSettings, group) -> tuple:
    """Scores [N, V / TP] and log-probabilities [N] of the labels, in fp32 at least."""
    scores = policy_scores(logits, settings.temperature, vocabulary, group)
    if settings.bf16_logprobs:  # rounded on the way in and out, as a softmax of bfloat16 tensors is
        return scores, label_logprobs(scores.bfloat16().float(), labels, group).bfloat16().float()
    return scores, label_logprobs(scores, labels, group)


def logprob_forward(vocabulary: Vocabulary, settings: UpdateSettings):
    """forward_step that returns each target's log-probability under the policy, [N]. They stay on the device, where the
    losses read them: the host would wait for them here, and again where it sends them back.
    """

    def forward_step(rl_row: RLRow, model):
        labels = rl_row.row.targets.label

        def loss_fn(output: Tensor) -> Tensor:
            if settings.head_chunk:
                return target_policy(
                    model.module, output, labels, settings.temperature, vocabulary, settings.head_chunk
                )[0]
            return _logprobs(output, labels, vocabulary, settings, model.module.pg_collection.tp)[1]

        return model.module.forward_row(rl_row.row, headless=settings.head_chunk > 0), loss_fn

    return forward_step


def policy_forward(vocabulary: Vocabulary, settings: UpdateSettings, teacher: Teacher | None = None):
    """forward_step of training/step.py for the policy. Args: teacher: whose hidden states the rows carry."""

    def forward_step(rl_row: RLRow, model):
        labels = rl_row.row.targets.label

        def loss_fn(output: Tensor):
            group = model.module.pg_collection.tp
            if settings.head_chunk:
                logprob, entropies = target_policy(
                    model.module, output, labels, settings.temperature, vocabulary, settings.head_chunk, True
                )
            else:
                scores, logprob = _logprobs(output, labels, vocabulary, settings, group)
                with torch.set_grad_enabled(settings.entropy_coef != 0):
                    entropies = by_chunks(partial(entropy, group=group), scores)

            def cast(column: Tensor | None) -> Tensor | None:
                return None if column is None else column.to(logprob.device, logprob.dtype)

            tis = settings.objective.tis is not None
            loss, metrics = settings.objective(
                logprob,
                cast(rl_row.old_logprob),
                cast(rl_row.advantage),
                cast(rl_row.weight),
                rl_row.unit,
                cast(rl_row.coefficient),
                cast(rl_row.kl_weight),
                cast(rl_row.reference_logprob),
                cast(rl_row.sampling_logprob) if tis else None,
                model.module.pg_collection.cp if rl_row.row.context is not None else None,
            )
            share = cast(rl_row.share)
            metrics["entropy"] = entropies.detach().sum()
            if settings.entropy_coef:
                entropy_loss = -(share * entropies).sum()
                loss = loss + settings.entropy_coef * entropy_loss
                metrics["entropy_loss"] = entropy_loss.detach()
            if settings.distill_coef:

                def from_teacher(own: Tensor, hidden: Tensor) -> Tensor:
                    taught = teacher.scores(hidden, settings.temperature, vocabulary, group)
                    return divergence(own, taught, settings.distill_kl, group)

                distance = by_chunks(from_teacher, scores, rl_row.teacher_hidden)
                distill_loss = (share * distance).sum()
                loss = loss + settings.distill_coef * distill_loss
                metrics |= {"distill_loss": distill_loss.detach(), "teacher_kl": distance.detach().sum()}
            if settings.sees_rollout_states:
                apart = (logprob.detach() - cast(rl_row.rollout_logprob)).abs()
                metrics[MISMATCH] = apart.sum()
                metrics[f"{MISMATCH}_max"] = torch.cat([apart.new_zeros(1), apart]).max()
            return loss, metrics

        return model.module.forward_row(rl_row.row, headless=settings.head_chunk > 0), loss_fn

    return forward_step


def with_old_logprobs(
    state: TrainState, rows: list[RLRow], length: int, vocabulary: Vocabulary, settings: UpdateSettings
) -> list[RLRow]:
    """The same rows with the old policy's log-probabilities: the rollout's, or those of the weights as they are now."""
    if settings.old_logprobs == "current":
        return rows
    if settings.old_logprobs == "rollout":
        return [dataclasses.replace(row, old_logprob=row.rollout_logprob) for row in rows]
    known = logprobs_of(state, rows, length, vocabulary, settings)
    return [dataclasses.replace(row, old_logprob=old) for row, old in zip(rows, known)]


def with_reference(
    state: TrainState, rows: list[RLRow], length: int, vocabulary: Vocabulary, settings: UpdateSettings
) -> list[RLRow]:
    """The same rows with the log-probabilities of a frozen model."""
    known = logprobs_of(state, rows, length, vocabulary, settings)
    return [dataclasses.replace(row, reference_logprob=one) for row, one in zip(rows, known)]


def logprobs_of(
    state: TrainState, rows: list[RLRow], length: int, vocabulary: Vocabulary, settings: UpdateSettings
) -> list[Tensor | None]:
    """Log-probability of each target of the rows, [N] each; None but on the last pipeline stage, where losses are
    computed."""
    return forward_only(state, rows, logprob_forward(vocabulary, settings), length) or [None] * len(rows)


def update_policy(
    state: TrainState,
    prepared: list[tuple[list[RLRow], int]],
    vocabulary: Vocabulary,
    settings: UpdateSettings,
    teacher: Teacher | None = None,
) -> dict[str, float]:
    """One optimizer step per update, in order.

    Args:
        prepared: for each update its rows, with old log-probabilities, and their length.

    Returns:
        Metrics: means over targets, or over units for what belongs to a ratio; for the losses and the gradient norm
        means over updates; `ratio_max` is the largest of all. The mismatch between engine and trainer is that of the
        first update, when both still have the same weights.
    """
    totals: dict[str, float] = {}
    norms, largest, mismatch = [], 0.0, {}
    for index, (rows, length) in enumerate(prepared):
        result = train_step(state, rows, policy_forward(vocabulary, settings, teacher), length)
        norms.append(result.grad_norm)
        difference, most = result.metrics.pop(MISMATCH, None), result.metrics.pop(f"{MISMATCH}_max", None)
        largest = max(largest, result.metrics.pop("ratio_max"))
        if index == 0 and difference is not None:
            mismatch = {MISMATCH: difference / max(result.metrics["targets"], 1.0), f"{MISMATCH}_max": most}
        for name, value in result.metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    targets, units = max(totals.pop("targets"), 1.0), max(totals.pop("units"), 1.0)
    per = {name: len(prepared) for name in _PER_UPDATE} | dict.fromkeys(_PER_UNIT, units)
    means = {name: value / per.get(name, targets) for name, value in totals.items()}
    spread = max(means.pop("advantage_squared") - means["advantage"] ** 2, 0.0)
    return {
        **means,
        "advantage_std": spread**0.5,
        "ratio_max": largest,
        **mismatch,
        "grad_norm": float(np.mean(norms)),
        "updates": float(len(prepared)),
        "targets": targets,
    }
