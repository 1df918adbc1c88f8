"""A microbatch of RL: a packed row, and what the objective needs of each of its targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.diffusion.context import Sharing
from megatron_dlm.diffusion.planner import Plan
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import split_views
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.methods import RESPONSE, TARGET
from megatron_dlm.rl.normalise import SLICE, Counts, slice_weight, unit_weights


@dataclass(frozen=True, slots=True)
class RLRow:
    """A row of N targets in U units (rl/objective.py).

    Attributes:
        row: tokens, layout, targets.
        advantage, weight: [U].
        kl_weight: [U], or None where it is `weight`.
        unit, coefficient: [N]; None where each target is a unit.
        share: [N], weight of each target in what is summed over targets (entropy, divergence from a teacher).
        rollout_logprob, sampling_logprob: [N], of the policy in the rollout, and of the distribution it drew from.
        old_logprob: [N]; None where it is that of the weights that are updated, or not known yet.
        reference_logprob: [N], of the frozen reference, if there is one.
        teacher_hidden: [N, h], the teacher's last hidden state for each target, if there is one; on the last pipeline
            stage.
    """

    row: Row
    advantage: Tensor
    weight: Tensor
    kl_weight: Tensor | None
    unit: Tensor | None
    coefficient: Tensor | None
    share: Tensor
    rollout_logprob: Tensor
    sampling_logprob: Tensor
    old_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    teacher_hidden: Tensor | None = None


def build_rows(
    records: Sequence[Graded],
    plan: Plan,
    traces: Mapping[int, Trace],
    advantages: Mapping[tuple[str, int], float],
    settings,
    data_rank: int,
    mask_id: int,
    pad_id: int,
    sharing: Sharing | None = None,
) -> list[RLRow]:
    """This rank's rows of one update.

    Args:
        records: of all responses of the update. traces: of those in this rank's rows, by index into `records`.
        advantages: by (group, sample).
        settings: `UpdateSettings`.
        sharing: under context parallelism: of each row this rank gets its part.
    """
    scores = np.array([advantages[record.group, record.sample] for record in records])
    told = Told([record.counts for record in records], scores, traces, settings)
    rows = []
    item = lambda trace: settings.states.item(trace, settings.step, settings.oldest_version)
    parts = {index: split_views(item(trace), settings.max_tokens_per_row) for index, trace in traces.items()}
    for members, numbers in zip(plan.ranks[data_rank], plan.parts[data_rank], strict=True):
        items = [(index, parts[index][number]) for index, number in zip(members, numbers, strict=True)]
        rows.append(told.complete(build_row(items, plan.length, mask_id, pad_id), sharing))
    return rows


class Told:
    """What is known of the responses of one update, from which any row of them is completed.

    Args:
        counts: of the R responses. advantage: float64 [R]. traces: of those in this rank's rows, by their place in
            `counts`, which names them in `Targets.response`.
        settings: `UpdateSettings`.
    """

    def __init__(self, counts: Sequence[Counts], advantage: np.ndarray, traces: Mapping[int, Trace], settings) -> None:
        self.counts, self.advantage, self.traces, self.settings = counts, advantage, traces, settings
        self.method = settings.states.method
        whole = self.method.unit == RESPONSE
        draws = settings.states.draws.draws if self.method.unit == TARGET else 1
        self.weights = unit_weights(counts, settings.aggregation, settings.longest, draws, whole)

    def complete(self, row: Row, sharing: Sharing | None = None) -> RLRow:
        """The row, or this rank's part of it, with what the objective needs, on the device. Of units with several
        targets all ranks that share the row have the columns.
        """
        response, index = row.targets.response.numpy(), row.targets.index.numpy()
        unit, of_unit = _units(self.method.unit, response, index)
        weight, kl_weight = self.weights[of_unit], None
        if self.settings.aggregation == SLICE:
            weight = weight / _slice_sizes(row)
        if self.settings.kl_slice_sum:
            kl_weight = np.full(len(weight), slice_weight(self.counts))
        elif self.method.kl_times_length:
            kl_weight = weight * np.array([self.counts[r].tokens for r in of_unit], dtype=np.float64)
        share, coefficient = weight, row.targets.weight.numpy()
        if unit is not None:
            total = np.bincount(unit, coefficient, minlength=len(of_unit))
            share = weight[unit] * coefficient / np.where(total > 0, total, 1.0)[unit]
        of_units = dict(advantage=self.advantage[of_unit], weight=weight, kl_weight=kl_weight)
        of_targets = dict(
            unit=unit,
            coefficient=None if unit is None else coefficient,
            share=share,
            rollout_logprob=self._of_rollout("logprobs", response, index),
            sampling_logprob=self._of_rollout("sampling_logprobs", response, index),
        )
        if sharing is not None and sharing.ranks > 1:
            row, kept = sharing.part(row)
            kept = kept.numpy()
            of_targets = {name: None if column is None else column[kept] for name, column in of_targets.items()}
            if unit is None:
                of_units = {name: None if column is None else column[kept] for name, column in of_units.items()}
        columns = {name: _here(column) for name, column in (of_units | of_targets).items()}
        return RLRow(row.to(platform.device()), **columns)

    def _of_rollout(self, name: str, response: np.ndarray, index: np.ndarray) -> np.ndarray:
        """A column of the traces at a row's targets, float64 [N]."""
        pairs = zip(response.tolist(), index.tolist())
        return np.array([getattr(self.traces[r], name)[i] for r, i in pairs], dtype=np.float64)


def _here(column: np.ndarray | None) -> Tensor | None:
    return None if column is None else torch.from_numpy(column).to(platform.device())


def _units(kind: str, response: np.ndarray, index: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The unit of each target, int64 [N] (None: each is its own), and the response of each unit, [U]."""
    if kind == TARGET:
        return None, response
    columns = response[None] if kind == RESPONSE else np.stack([response, index])
    found, unit = np.unique(columns, axis=1, return_inverse=True)
    return unit.reshape(-1).astype(np.int64), found[0]


def _slice_sizes(row: Row) -> np.ndarray:
    """Targets in the view of each target, [N]."""
    layout, slot = row.layout, row.targets.slot  # a response may stand in a row in several parts
    columns = [column[slot] for column in (layout.group, layout.response, layout.view, layout.block)]
    _, view, size = np.unique(
        np.stack([column.numpy() for column in columns]), axis=1, return_inverse=True, return_counts=True
    )
    return size[view.reshape(-1)]
