"""What an item costs in a row: tokens, and pairs of a query and a key.

A row's tokens cost the same in all matrix products of the layers. In attention a token costs as much as it sees: a late
block of a long response many times what an early one does. So packing balances both.

Invariant (tests/diffusion/test_balance.py): areas are those of the visibility rule, counted pair by pair.
"""

from __future__ import annotations

import numpy as np

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Load
from megatron_dlm.diffusion.views import Item


def load_of(item: Item) -> Load:
    """What an item asks of a row."""
    shared, end = item.shared_length, item.clean_end
    shared_area = _clean_area(item.grid, item.prompt_length, 0, shared)
    return Load(item.group, shared, item.own_length, shared_area, _own_area(item, shared, end))


def _own_area(item: Item, shared: int, end: int) -> int:
    sizes = item.views.sizes.astype(np.int64)
    before = np.zeros_like(sizes)  # finished text that a view sees: all of it before its block
    if item.grid.block_size is not None:
        starts = item.views.block * item.grid.block_size - item.grid.offset(item.prompt_length)
        before = np.maximum(starts, 0)
    return _clean_area(item.grid, item.prompt_length, shared, end) + int((sizes * (before + sizes)).sum())


def _clean_area(grid: Grid, prompt_length: int, start: int, end: int) -> int:
    """Keys that the finished text from position `start` to `end` sees: up to the end of its block, or of the text that
    is stored."""
    if end <= start:
        return 0
    if grid.block_size is None:
        return (end - start) * end
    position = np.arange(start, end)
    offset = grid.offset(prompt_length)
    block_end = ((position + offset) // grid.block_size + 1) * grid.block_size - offset
    return int(np.minimum(block_end, end).sum())
