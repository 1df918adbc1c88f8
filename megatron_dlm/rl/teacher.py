"""A frozen teacher: what another model says of the tokens that the policy learns.

The teacher sees the same traces as the policy. A diffusion model with the policy's blocks is asked in the policy's own
rows; one with blocks of another size in the states of its own blocks, in the order of the trace. An autoregressive
model (blocks of one token, logits ahead) is asked what follows the finished text before each token.

Only its last hidden states are kept, [N, h] for each row in host memory, until the policy's loss needs the
distributions; so its vocabulary is never held for more than one row.

Source: on-policy distillation, arXiv 2306.13649; into block diffusion models, arXiv 2606.06712
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import fp8_tokens
from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.layout import CLEAN, PADDING, Grid, Layout, predecessors
from megatron_dlm.diffusion.planner import pack, row_multiple
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item, Views, largest_part, split_views, trace_views
from megatron_dlm.model.policy import Vocabulary, policy_scores
from megatron_dlm.model.row_params import RowParams
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rl.rows import RLRow
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import forward_only


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model.

    Attributes:
        state: without an optimizer. model: its sizes, resolved.
        grid, shrinkage: of the policy's training.
        budget: tokens of a row, where the teacher has rows of its own; its longest text with one copy may need more.
    """

    state: TrainState
    model: ModelConfig
    grid: Grid
    shrinkage: int = 1
    budget: int = 4096

    @property
    def is_autoregressive(self) -> bool:
        return self.model.is_autoregressive

    @property
    def shares_rows(self) -> bool:
        """Whether the teacher is asked in the very rows of the policy."""
        return self.model.block_size == self.grid.block_size and not self.is_autoregressive

    @property
    def knows_any_state(self) -> bool:
        """Whether it can be asked in states that are not of the trace."""
        return self.shares_rows or self.is_autoregressive

    def with_hidden(
        self, rows: list[RLRow], length: int, traces: Mapping[int, Trace], mask_id: int, pad_id: int
    ) -> list[RLRow]:
        """The same rows with the teacher's hidden states, on the host. Collective.

        Args:
            rows, length: of this rank in one update. traces: what they are of, by `Targets.response`.
        """
        asked = [row.row for row in rows]
        if not self.shares_rows:
            asked, length = self._own_rows(traces, mask_id, pad_id)
        hidden = forward_only(self.state, asked, self._hidden_forward, length)
        if not hidden:  # not the last pipeline stage
            return rows
        if not self.shares_rows:
            together, found = torch.cat([_keys(row) for row in asked]), torch.cat(hidden)
            hidden = [found[_places(_keys(row.row), together)] for row in rows]
        return [dataclasses.replace(row, teacher_hidden=found) for row, found in zip(rows, hidden)]

    @torch.no_grad()
    def scores(self, hidden: Tensor, temperature: float, vocabulary: Vocabulary, group) -> Tensor:
        """The teacher's `policy_scores` [N, V / TP] from hidden states [N, h]; on the last pipeline stage."""
        model = self.state.unwrapped_chunks()[-1]
        return policy_scores(model.head(hidden.to(platform.device())), temperature, vocabulary, group)

    def _own_rows(self, traces: Mapping[int, Trace], mask_id: int, pad_id: int) -> tuple[list[Row], int]:
        """Rows of the teacher's own over all of this rank's responses, and their length; as many and as long on every
        data-parallel rank, whose experts work together."""
        groups = self.state.groups
        items = [(index, self._item(trace)) for index, trace in sorted(traces.items())]
        budget = max([self.budget, *(largest_part(item) for _, item in items)])
        parts = [(index, part) for index, item in items for part in split_views(item, budget)]
        config = self.state.config
        attention = self.state.unwrapped_chunks()[0].backend_of_rows(platform.device())
        multiple = row_multiple(groups.tp_size, fp8_tokens(config.fp8, config.fp8_recipe), attention)
        loads = [load_of(part) for _, part in parts]
        plan = pack(loads, budget, 1, multiple)
        built = [build_row([parts[n] for n in members], plan.length, mask_id, pad_id) for members in plan.ranks[0]]
        if self.is_autoregressive:
            built = [clean_row(row) for row in built]
        needed = -(-max([len(row.tokens) for row in built], default=1) // multiple) * multiple
        count, length = (max(column) for column in zip(*gather_objects((len(built), needed), groups.dp)))
        if len(self.state.chunks) > 1:  # interleaved stages take turns in rounds
            count = -(-count // groups.pp_size) * groups.pp_size
        nothing = build_row([], length, mask_id, pad_id)
        rows = [_padded(row, length, pad_id) for row in built] + [nothing] * (count - len(built))
        return [row.to(platform.device()) for row in rows], length

    def _item(self, trace: Trace) -> Item:
        if self.is_autoregressive:
            return _token_by_token(trace)
        grid = Grid(self.model.block_size, self.grid.anchor)
        views = trace_views(trace, grid, self.shrinkage)
        return Item(trace.prompt_key, trace.tokens, len(trace.prompt_ids), views, grid)

    def _hidden_forward(self, row: Row, model):
        module, layout = model.module, row.layout
        if self.is_autoregressive:
            params = RowParams(
                position=layout.position, slots=row.targets.slot, attention=module.attention_of(row), headless=True
            )
            return module.forward_tokens(row.tokens, params), lambda hidden: hidden.cpu()
        return module.forward_row(row, headless=True), lambda hidden: hidden.cpu()


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


def _padded(row: Row, length: int, pad_id: int) -> Row:
    tokens = F.pad(row.tokens, (0, length - len(row.tokens)), value=pad_id)
    return Row(tokens, row.layout.padded(length), row.targets)


def _keys(row: Row) -> Tensor:
    """Which token of which response each target is of, int64 [N] on the host."""
    return (row.targets.response * 2**32 + row.targets.index).cpu()


def _places(wanted: Tensor, known: Tensor) -> Tensor:
    """Where each of the wanted keys [N] stands among the known ones, int64 [N]."""
    found, order = known.sort()
    return order[torch.searchsorted(found, wanted)]
