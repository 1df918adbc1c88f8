"""Context parallelism: the tokens of one row on several ranks.

    rank 0    clean text a  |  noisy copies 2, 5, 6 ...          its queries see: its own copies, and the clean
    rank 1    clean text b  |  noisy copies 1, 3, 4 ...          text of all ranks, a + b

A noisy copy of a block is read by its own tokens alone, so it stays whole on one rank. Clean text is read by everybody:
its keys and values, and nothing else, are exchanged in each layer (model/attention.py). Which rank stores which clean
token does not matter.

`deal` gives each rank as many tokens, up to one block, and shares out the attention: units with most of it go first, to
the rank with least. A unit is a noisy copy, or a block of clean text.

Pure functions, the same on every rank of a context-parallel group. Models of full attention have no clean text to share
and no small units; they are refused before (config/validate.py).

Invariants (tests/diffusion/test_context.py):
  - every token and every target of the row is on exactly one rank, with the keys that the visibility rule gives it;
  - no rank holds more than `shared_length` tokens.
"""

from __future__ import annotations

import dataclasses
import heapq
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.diffusion.layout import CLEAN, PADDING, Layout
from megatron_dlm.diffusion.rows import Context, Row, Targets


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the ranks of a context-parallel group share their rows.

    Attributes:
        ranks, rank: size of the group, and this rank's place in it.
        block_size, logit_shift: of the model.
        multiple_of: what a rank holds of a row is rounded up to a multiple of this.
        pad_id: token of padding slots.
    """

    ranks: int
    rank: int
    block_size: int | None
    multiple_of: int
    pad_id: int
    logit_shift: int = 0

    def length(self, length: int) -> int:
        """T of a rank's part of rows of this length."""
        return length if self.ranks == 1 else shared_length(length, self.ranks, self.block_size, self.multiple_of)

    def part(self, row: Row) -> tuple[Row, Tensor | None]:
        """This rank's part of a row, and which of its targets are in it; the row itself, and None, where it is not
        shared.
        """
        if self.ranks == 1:
            return row, None
        length = self.length(len(row.tokens))
        return share_row(row, self.ranks, self.rank, length, self.pad_id, self.logit_shift)


def shared_length(length: int, ranks: int, block_size: int, multiple_of: int) -> int:
    """Tokens that a rank needs for its part of any row of `length` tokens.

    Units have at most `block_size` tokens. If one had no room on any rank, all ranks together would hold more than the
    whole row.
    """
    needed = -(-length // ranks) + block_size - 1
    return -(-needed // multiple_of) * multiple_of


def deal(layout: Layout, ranks: int, capacity: int) -> list[np.ndarray]:
    """Which slots of a row each rank gets, ascending; padding goes to nobody.

    Args:
        layout: of the whole row.
        capacity: most tokens for a rank.

    Raises:
        ValueError: they have no room (the caller's fault: `shared_length`).
    """
    columns = {field.name: getattr(layout, field.name).cpu().numpy().astype(np.int64) for field in fields(Layout)}
    slots = np.flatnonzero(columns["group"] != PADDING)
    if not len(slots):
        return [slots] * ranks
    names = np.stack([columns[name][slots] for name in ("group", "response", "view", "block")])
    _, unit, size = np.unique(names, axis=1, return_inverse=True, return_counts=True)
    unit = unit.reshape(-1)
    start = np.full(len(size), np.iinfo(np.int64).max)
    np.minimum.at(start, unit, columns["position"][slots])  # the finished text before a block is all there
    area = size * (start + size)
    rank_of = np.empty(len(size), np.int64)
    least = [(0, 0, rank) for rank in range(ranks)]  # a heap: area, tokens, rank
    sizes, areas = size.tolist(), area.tolist()
    for one in np.argsort(-area, kind="stable").tolist():
        full = []
        while least and least[0][1] + sizes[one] > capacity:
            full.append(heapq.heappop(least))
        if not least:
            raise ValueError(f"a block of {sizes[one]} tokens has no room on {ranks} ranks of {capacity} tokens")
        work, tokens, rank = least[0]
        rank_of[one] = rank
        heapq.heapreplace(least, (work + areas[one], tokens + sizes[one], rank))
        for other in full:
            heapq.heappush(least, other)
    return [slots[rank_of[unit] == rank] for rank in range(ranks)]


def share_row(row: Row, ranks: int, rank: int, length: int, pad_id: int, logit_shift: int = 0) -> tuple[Row, Tensor]:
    """This rank's part of a row, and which of the row's targets are in it, int64 [n], ascending.

    Args:
        row: the whole one, on the host.
        length: T of the part (`shared_length`).
        pad_id: token of the padding slots.
        logit_shift: of the model. A target goes to the rank that has the token where it is read, and its slot is
            already the one to read.
    """
    parts = deal(row.layout, ranks, length)
    clean = [part[row.layout.view.numpy()[part] == CLEAN] for part in parts]
    width = max(len(slots) for slots in clean)
    mine = torch.from_numpy(parts[rank])
    place = torch.full((len(row.tokens),), -1)
    place[mine] = torch.arange(len(mine))
    read = row.read_slots(logit_shift)
    kept = torch.nonzero(place[read] >= 0)[:, 0]
    targets = Targets(*(getattr(row.targets, field.name)[kept] for field in fields(Targets)))
    context = Context(
        _joined([_taken(row.layout, torch.from_numpy(slots)).padded(width) for slots in clean]),
        width,
        place[torch.from_numpy(clean[rank])],
    )
    part = Row(
        F.pad(row.tokens[mine], (0, length - len(mine)), value=pad_id),
        _taken(row.layout, mine).padded(length),
        dataclasses.replace(targets, slot=place[read[kept]]),
        context,
    )
    return part, kept


def _taken(layout: Layout, slots: Tensor) -> Layout:
    return Layout(*(getattr(layout, field.name)[slots] for field in fields(Layout)))


def _joined(layouts: list[Layout]) -> Layout:
    return Layout(*(torch.cat([getattr(layout, field.name) for layout in layouts]) for field in fields(Layout)))
