"""One RL step's updates of the policy: plan, fetch traces, old log-probabilities, optimizer steps.

Everything is planned from `Graded` records before any trace moves; the traces of all updates of the step then move in
one exchange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import ROW_MULTIPLE, Plan, pack, partition
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item, trace_views
from megatron_dlm.model.policy import Vocabulary, entropy, label_logprobs, policy_scores
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.rl.exchange import Graded, deliver
from megatron_dlm.rl.objective import PolicyObjective, response_weights
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import forward_only, train_step

MISMATCH = "train_rollout_logprob_abs_diff"


@dataclass(frozen=True, slots=True)
class RLRow:
    """A row with what the objective needs of each of its N targets; `old_logprob` is None until it is known."""

    row: Row
    advantage: Tensor
    weight: Tensor
    rollout_logprob: Tensor
    old_logprob: Tensor | None


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """What `update_policy` is told of the configuration.

    Attributes:
        objective: the loss. temperature: of the policy, as it was sampled. aggregation, max_response_len:
            `response_weights`.
        num_updates: optimizer steps for this RL step. max_tokens_per_row: row budget. grid, shrinkage: how traces
            become views.
        use_rollout_logprobs: take the rollout's log-probabilities as the old policy's instead of computing them again:
            those of the weights that decided each token, of whatever version.
        oldest_version: of the weights whose tokens are learned.
    """

    objective: PolicyObjective
    temperature: float
    aggregation: str
    max_response_len: int
    num_updates: int
    max_tokens_per_row: int
    grid: Grid
    shrinkage: int
    use_rollout_logprobs: bool
    oldest_version: int = 0


def trace_item(trace: Trace, grid: Grid, shrinkage: int, oldest_version: int = 0) -> Item:
    """A trace, ready to be laid out; nothing is learned of tokens that older weights decided."""
    views = trace_views(trace, grid, shrinkage, oldest_version)
    return Item(trace.prompt_key, trace.tokens, len(trace.prompt_ids), views, grid)


def plan_updates(
    records: Sequence[Graded], settings: UpdateSettings, groups: Groups, stream: int
) -> list[tuple[list[Graded], Plan]]:
    """The updates of this RL step: for each its records and its rows. The same on every rank."""
    multiple = math.lcm(ROW_MULTIPLE, groups.tp_size)
    updates = []
    for members in partition(len(records), settings.num_updates, stream):
        chosen = [records[index] for index in members]
        updates.append(
            (chosen, pack([graded.load for graded in chosen], settings.max_tokens_per_row, groups.dp_size, multiple))
        )
    return updates


def fetch(updates: list[tuple[list[Graded], Plan]], traces: Sequence[Trace], groups: Groups) -> list[dict[int, Trace]]:
    """For each update, the traces that this rank's rows need, by index into the update's records. Collective."""
    needs = [
        [index for row in plan.ranks[rank] for index in row] for rank in range(groups.dp_size) for _, plan in updates
    ]
    per_update = len(updates)
    data_ranks = gather_objects(groups.dp_rank)
    wanted = [
        [updates[u][0][index] for u in range(per_update) for index in needs[data_rank * per_update + u]]
        for data_rank in data_ranks
    ]
    received = iter(deliver(wanted, traces, groups.rank))
    return [{index: next(received) for index in needs[groups.dp_rank * per_update + u]} for u in range(per_update)]


def build_rows(
    records: list[Graded],
    plan: Plan,
    traces: dict[int, Trace],
    advantages: dict[tuple[str, int], float],
    settings: UpdateSettings,
    dp_rank: int,
    mask_id: int,
    pad_id: int,
) -> list[RLRow]:
    """This rank's rows of one update."""
    weights = response_weights(
        [graded.num_targets for graded in records], settings.aggregation, settings.max_response_len
    )
    rows = []
    for members in plan.ranks[dp_rank]:
        items = [
            (index, trace_item(traces[index], settings.grid, settings.shrinkage, settings.oldest_version))
            for index in members
        ]
        row = build_row(items, plan.length, mask_id, pad_id)
        response, index = row.targets.response.numpy(), row.targets.index.numpy()
        advantage = np.array([advantages[graded.group, graded.sample] for graded in records])[response]
        rollout = np.array([traces[r].logprobs[i] for r, i in zip(response.tolist(), index.tolist())], dtype=np.float64)
        columns = (torch.from_numpy(column).to(platform.device()) for column in (advantage, weights[response], rollout))
        rows.append(RLRow(row.to(platform.device()), *columns, old_logprob=None))
    return rows


def logprob_forward(vocabulary: Vocabulary, temperature: float):
    """forward_step that returns each target's log-probability under the policy, [N] on the CPU, in the logits'
    precision (fp32 at least).
    """

    def forward_step(rl_row: RLRow, model):
        def loss_fn(logits: Tensor) -> Tensor:
            group = model.module.pg_collection.tp
            return label_logprobs(
                policy_scores(logits, temperature, vocabulary, group), rl_row.row.targets.label, group
            ).cpu()

        return model.module.forward_row(rl_row.row), loss_fn

    return forward_step


def policy_forward(vocabulary: Vocabulary, settings: UpdateSettings):
    """forward_step of training/step.py for TraceRL."""

    def forward_step(rl_row: RLRow, model):
        def loss_fn(logits: Tensor):
            group = model.module.pg_collection.tp
            scores = policy_scores(logits, settings.temperature, vocabulary, group)
            logprob = label_logprobs(scores, rl_row.row.targets.label, group)
            cast = lambda column: column.to(logprob.device, logprob.dtype)
            old, rollout = cast(rl_row.old_logprob), cast(rl_row.rollout_logprob)
            loss, metrics = settings.objective(logprob, old, cast(rl_row.advantage), cast(rl_row.weight))
            metrics["entropy"] = entropy(scores.detach(), group).sum()
            metrics[MISMATCH] = (logprob.detach() - rollout).abs().sum()
            return loss, metrics

        return model.module.forward_row(rl_row.row), loss_fn

    return forward_step


def old_logprobs(
    state: TrainState, rows: list[RLRow], length: int, vocabulary: Vocabulary, settings: UpdateSettings
) -> list[RLRow]:
    """The same rows with the old policy's log-probabilities: the rollout's, or those of the weights as they are now."""
    if settings.use_rollout_logprobs:
        known = [rl_row.rollout_logprob for rl_row in rows]
    else:
        # Only the last pipeline stage computes losses, so only it needs them.
        known = forward_only(state, rows, logprob_forward(vocabulary, settings.temperature), length) or [None] * len(
            rows
        )
    return [RLRow(r.row, r.advantage, r.weight, r.rollout_logprob, old) for r, old in zip(rows, known)]


def update_policy(
    state: TrainState, prepared: list[tuple[list[RLRow], int]], vocabulary: Vocabulary, settings: UpdateSettings
) -> dict[str, float]:
    """One optimizer step per update, in order.

    Args:
        prepared: for each update its rows, with old log-probabilities, and their length.

    Returns:
        Metrics: means over targets; for the losses and the gradient norm means over updates; `ratio_max` is the largest
        of all. The mismatch between engine and trainer is that of the first update, when both still have the same
        weights.
    """
    totals: dict[str, float] = {}
    norms, mismatch, largest = [], 0.0, 0.0
    for index, (rows, length) in enumerate(prepared):
        result = train_step(state, rows, policy_forward(vocabulary, settings), length)
        norms.append(result.grad_norm)
        difference = result.metrics.pop(MISMATCH)
        largest = max(largest, result.metrics.pop("ratio_max"))
        if index == 0:
            mismatch = difference / max(result.metrics["targets"], 1.0)
        for name, value in result.metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    targets = max(totals.pop("targets"), 1.0)
    per_update = {name: totals.pop(name) / len(prepared) for name in ("loss", "pg_loss", "kl_loss")}
    per_target = {name: value / targets for name, value in totals.items()}
    return {
        **per_update,
        **per_target,
        "ratio_max": largest,
        MISMATCH: mismatch,
        "grad_norm": float(np.mean(norms)),
        "updates": float(len(prepared)),
        "targets": targets,
    }
