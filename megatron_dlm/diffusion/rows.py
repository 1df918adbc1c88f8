"""From items to a row: (tokens, layout, targets).

A row holds, for each group, the prompt's full blocks once, then for each of the group's items the clean text that its
views read and the views. The language-model head is evaluated at the target slots only.

Invariants (tests/diffusion/test_rows.py):
  - losses and gradients over a row are those of one naive row per denoising step;
  - the order of items, and which of them share a row, do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.diffusion.layout import CLEAN, PADDING, PROMPT, Layout, moved, predecessors
from megatron_dlm.diffusion.views import Item


@dataclass(frozen=True, slots=True)
class Targets:
    """The N tokens of a row that are predicted; each a tensor [N].

    slot: int64, where in the row the token is hidden (or stands, in finished text), see `Row.read_slots`; in a part
        of a row (diffusion/context.py) where the model reads it. label: int64, the token. weight: float64, its share
        of the update's loss.
    response: int64, which item (an id that the caller gave). index: int64, offset of the token in that item's response.
    """

    slot: Tensor
    label: Tensor
    weight: Tensor
    response: Tensor
    index: Tensor

    def to(self, device: torch.device) -> Targets:
        return Targets(*(moved(getattr(self, field.name), device) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Context:
    """What a rank that has a part of a row knows of the other parts (diffusion/context.py).

    Attributes:
        clean: layout of the clean text of all ranks, [ranks * width]: that of rank 0, that of rank 1, ..., each filled
            up with padding.
        width: most clean tokens that a rank has.
        slot: int64 [n], where this rank's clean tokens, the first n of its part of `clean`, stand in its row.
    """

    clean: Layout
    width: int
    slot: Tensor

    def to(self, device: torch.device) -> Context:
        return Context(self.clean.to(device), self.width, moved(self.slot, device))


@dataclass(frozen=True, slots=True)
class Row:
    """One packed microbatch: tokens int64 [T], the layout of those T tokens, and its targets. `context`: of a part of a
    row, whose other parts are on other ranks. `causal`: some targets are tokens of the finished text. `made`: what a
    model keeps with the row while its virtual stages go over it (model/attention_backends.py); no part of its value.
    """

    tokens: Tensor
    layout: Layout
    targets: Targets
    context: Context | None = None
    causal: bool = False
    made: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> Row:
        context = None if self.context is None else self.context.to(device)
        tokens = moved(self.tokens, device)
        return Row(tokens, self.layout.to(device), self.targets.to(device), context, self.causal)

    def read_slots(self, logit_shift: int) -> Tensor:
        """int64 [N], where a model with this logit shift is read for each target: in the slot that hides the token, or
        in that of the token before it; for a token of the finished text always there.
        """
        slots = self.targets.slot
        if self.context is not None or not (logit_shift or self.causal):
            return slots
        before = predecessors(self.layout, slots)
        return before if logit_shift else torch.where(self.layout.view[slots] == CLEAN, before, slots)


class _Columns:
    """Grows the columns of a row piece by piece."""

    def __init__(self) -> None:
        self.length = 0
        self.pieces: list[tuple[np.ndarray, ...]] = []

    def add(self, tokens: np.ndarray, group: int, response: int, view, block, position: np.ndarray) -> int:
        """Append tokens; returns the slot of the first."""
        start, n = self.length, len(tokens)
        columns = (tokens, group, response, view, block, position)
        self.pieces.append(tuple(np.broadcast_to(np.asarray(column, dtype=np.int64), (n,)) for column in columns))
        self.length += n
        return start

    def stacked(self) -> np.ndarray:
        """int64 [6, length]: tokens, group, response, view, block, position."""
        return (
            np.concatenate([np.stack(piece) for piece in self.pieces], axis=1)
            if self.pieces
            else np.zeros((6, 0), np.int64)
        )


def build_row(items: list[tuple[int, Item]], length: int, mask_id: int, pad_id: int) -> Row:
    """Lay out items in one row of `length` tokens.

    Args:
        items: (id, item) pairs; ids name the items in `Targets.response`.
        length: T. Slots that no item needs become padding.
        mask_id: the token shown where a view hides one.
        pad_id: the token of padding slots.

    Raises:
        ValueError: the items need more than `length` tokens (the planner's fault).
    """
    columns, targets = _Columns(), []
    for group, members in enumerate(_by_group(items)):
        first = members[0][1]
        if any(not _same_prompt(first, item) for _, item in members):
            raise ValueError(f"items of group {first.group!r} do not have the same prompt and grid")
        shared = np.arange(first.shared_length)
        columns.add(
            first.tokens[shared], group, PROMPT, CLEAN, first.grid.block_of(shared, first.prompt_length), shared
        )
        for response, (id_, item) in enumerate(members):
            targets.append(_add_item(columns, group, response, id_, item, mask_id))
    if columns.length > length:
        raise ValueError(f"items of {columns.length} tokens do not fit a row of {length}")
    columns.add(
        np.full(length - columns.length, pad_id), PADDING, PROMPT, CLEAN, 0, np.zeros(length - columns.length, np.int64)
    )
    tokens, *layout = torch.from_numpy(columns.stacked())
    joined = [np.concatenate(column) for column in zip(*targets)] or [np.zeros(0, np.int64)] * 5
    slot, label, weight, response, index = (torch.from_numpy(column) for column in joined)
    return Row(
        tokens,
        Layout(*(column.to(torch.int32) for column in layout)),
        Targets(slot, label, weight.double(), response, index),
        causal=any(item.views.clean for _, item in items),
    )


def _by_group(items: list[tuple[int, Item]]) -> list[list[tuple[int, Item]]]:
    groups: dict[str, list[tuple[int, Item]]] = {}
    for id_, item in items:
        groups.setdefault(item.group, []).append((id_, item))
    return list(groups.values())


def _same_prompt(a: Item, b: Item) -> bool:
    prompt = a.prompt_length
    return a.grid == b.grid and prompt == b.prompt_length and np.array_equal(a.tokens[:prompt], b.tokens[:prompt])


def _add_item(
    columns: _Columns, group: int, response: int, id_: int, item: Item, mask_id: int
) -> tuple[np.ndarray, ...]:
    """Append the item's clean text and views; returns its columns of `Targets`."""
    clean = np.arange(item.shared_length, item.clean_end)
    start = columns.add(
        item.tokens[clean], group, response, CLEAN, item.grid.block_of(clean, item.prompt_length), clean
    )
    views = item.views
    if views.clean:
        where = views.position[views.target]
        slots = start + where - item.shared_length
        return (
            slots,
            item.tokens[where],
            views.weight[views.target],
            np.full(len(where), id_),
            where - item.prompt_length,
        )
    n, width = views.position.shape
    exists = views.position >= 0
    position = views.position[exists]
    hidden = views.masked[exists]
    tokens = np.full(len(position), mask_id, dtype=np.int64)
    tokens[~hidden] = item.tokens[position[~hidden]]  # behind the text there are masks only
    # Views are numbered within the item. Two views of one block must differ; of different blocks they may not see each
    # other anyway.
    number = np.broadcast_to(np.arange(1, n + 1)[:, None], (n, width))[exists]
    block = np.broadcast_to(views.block[:, None], (n, width))[exists]
    start = columns.add(tokens, group, response, number, block, position)
    target = views.target[exists]
    where = position[target]
    return (
        start + np.flatnonzero(target),
        item.tokens[where],
        views.weight[exists][target],
        np.full(len(where), id_, dtype=np.int64),
        where - item.prompt_length,
    )
