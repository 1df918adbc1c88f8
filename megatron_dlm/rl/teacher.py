"""A frozen teacher: what another model says of the tokens that the policy learns.

The teacher sees the same traces as the policy. A diffusion model is asked in the same states: of its own blocks, with
the order of the trace, if its blocks are of another size. An autoregressive model (blocks of one token, logits ahead)
is asked what follows the finished text before each token.

Only its last hidden states are kept, [N, h] for each row, until the policy's loss needs the distributions; so the
vocabulary is never held for more than one row.

Source: on-policy distillation, arXiv 2306.13649; into block diffusion models, arXiv 2606.06712
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.layout import CLEAN, PADDING, PROMPT, Grid, Layout, predecessors
from megatron_dlm.diffusion.planner import ROW_MULTIPLE, Plan
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item, Views, trace_views
from megatron_dlm.model.attention import DenseAttention
from megatron_dlm.model.policy import Vocabulary, policy_scores
from megatron_dlm.model.row_params import RowParams
from megatron_dlm.rl.rows import RLRow
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import forward_only


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model.

    Attributes:
        state: without an optimizer. model: its sizes, resolved.
        grid: of the policy's training.
    """

    state: TrainState
    model: ModelConfig
    grid: Grid

    @property
    def is_autoregressive(self) -> bool:
        return self.model.block_size == 1 and bool(self.model.logit_shift)

    @property
    def shares_rows(self) -> bool:
        """Whether the teacher is asked in the very rows of the policy."""
        return self.model.block_size == self.grid.block_size and not self.is_autoregressive

    def with_hidden(
        self, rows: list[RLRow], length: int, plan: Plan, traces: Mapping[int, Trace], mask_id: int, pad_id: int
    ) -> list[RLRow]:
        """The same rows with the teacher's hidden states. Collective.

        Args:
            rows, length: of this rank in one update. plan, traces: what they were built from.
        """
        groups = self.state.groups
        asked, order = [row.row for row in rows], None
        if not self.shares_rows:
            members = plan.ranks[groups.dp_rank]
            asked, order, length = self._own_rows(rows, members, traces, mask_id, pad_id)
        hidden = forward_only(self.state, asked, self._hidden_forward, length)
        if not hidden:  # not the last pipeline stage
            return rows
        if order is not None:
            hidden = [found[places] for found, places in zip(hidden, order)]
        return [dataclasses.replace(row, teacher_hidden=found) for row, found in zip(rows, hidden)]

    @torch.no_grad()
    def scores(self, rl_row: RLRow, temperature: float, vocabulary: Vocabulary, group) -> Tensor:
        """The teacher's `policy_scores` [N, V / TP] at the row's targets; on the last pipeline stage."""
        model = self.state.unwrapped_chunks()[-1]
        return policy_scores(model.head(rl_row.teacher_hidden), temperature, vocabulary, group)

    def _own_rows(
        self,
        rows: Sequence[RLRow],
        members: Sequence[Sequence[int]],
        traces: Mapping[int, Trace],
        mask_id: int,
        pad_id: int,
    ) -> tuple[list[Row], list[Tensor], int]:
        """Rows of the teacher's own, which target of them belongs to each of the policy's, and their length."""
        items = [[(index, self._item(traces[index])) for index in dict.fromkeys(inside)] for inside in members]
        built = [build_row(inside, _room(inside), mask_id, pad_id) for inside in items]
        if self.is_autoregressive:
            built = [clean_row(row) for row in built]
        multiple = math.lcm(ROW_MULTIPLE, self.state.groups.tp_size)
        length = multiple * max(1, *(-(-len(row.tokens) // multiple) for row in built))
        asked = [_padded(row, length, pad_id).to(platform.device()) for row in built]
        return asked, [_places(own.row, other) for own, other in zip(rows, asked)], length

    def _item(self, trace: Trace) -> Item:
        if self.is_autoregressive:
            return _token_by_token(trace)
        grid = Grid(self.model.block_size, self.grid.anchor)
        return Item(trace.prompt_key, trace.tokens, len(trace.prompt_ids), trace_views(trace, grid), grid)

    def _hidden_forward(self, row: Row, model):
        module = model.module
        if not self.is_autoregressive:
            return module.forward_row(row, headless=True), lambda hidden: hidden
        layout = row.layout
        params = RowParams(
            position=layout.position, slots=row.targets.slot, attention=DenseAttention(layout), headless=True
        )
        return module.forward_tokens(row.tokens, params), lambda hidden: hidden


def clean_row(row: Row) -> Row:
    """What a model needs that predicts from the finished text alone: the row without noisy copies and padding, its
    targets at the slots where they are read, those of the tokens before them.
    """
    layout = row.layout
    kept = (layout.view == CLEAN) & (layout.group != PADDING)
    place = kept.long().cumsum(0) - 1
    slots = place[predecessors(layout, row.targets.slot)]
    columns = {field.name: getattr(layout, field.name)[kept] for field in dataclasses.fields(Layout)}
    return Row(row.tokens[kept], Layout(**columns), dataclasses.replace(row.targets, slot=slots))


def _token_by_token(trace: Trace) -> Item:
    """The response in blocks of one token."""
    prompt, end = len(trace.prompt_ids), len(trace.prompt_ids) + len(trace.response_ids)
    position = np.arange(prompt, end)[:, None]
    hidden = np.ones(position.shape, dtype=bool)
    views = Views(position[:, 0], position, hidden, hidden, np.ones(position.shape))
    return Item(trace.prompt_key, trace.tokens, prompt, views, Grid(1))


def _room(items: Sequence[tuple[int, Item]]) -> int:
    """Tokens of a row of these items, each with the prompt of its own at worst."""
    return sum(item.shared_length + item.own_length for _, item in items)


def _padded(row: Row, length: int, pad_id: int) -> Row:
    missing = length - len(row.tokens)
    values = {"group": PADDING, "response": PROMPT, "view": CLEAN, "block": 0, "position": 0}
    columns = {name: F.pad(getattr(row.layout, name), (0, missing), value=value) for name, value in values.items()}
    return Row(F.pad(row.tokens, (0, missing), value=pad_id), Layout(**columns), row.targets)


def _places(own: Row, other: Row) -> Tensor:
    """For each target of `own`, the target of `other` that is of the same token, int64 [N]."""
    key = lambda row: row.targets.response * 2**32 + row.targets.index
    found, order = key(other).sort()
    return order[torch.searchsorted(found, key(own))]
