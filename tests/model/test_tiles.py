"""Tables of tiles against the visibility rule, pair by pair."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.diffusion.context import share_row, shared_length
from megatron_dlm.diffusion.layout import Grid, Layout, visible
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.model import tiles
from megatron_dlm.model.tiles import Tables, classes
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item
from tests.diffusion.test_context import row_of as ragged_row

TILE = 8


def rule(q: Layout, k: Layout) -> Tensor:
    """The rule for every pair; padding sees nothing, not even itself."""
    return visible(q, dataclasses.replace(k))


def by_tile(mask: Tensor, tile: int) -> Tensor:
    return mask.unfold(0, tile, tile).unfold(1, tile, tile)


def whole(layout: Layout, tile: int = TILE) -> Layout:
    return layout.padded(-(-len(layout.group) // tile) * tile)


def listed(count: Tensor, which: Tensor) -> Tensor:
    """The tiles that a table lists, bool [N, M]; they stand first in their line, ascending."""
    lines, columns = which.shape
    assert torch.equal(which.sort(1).values, torch.arange(columns).int().expand(lines, -1))
    found = torch.zeros(lines, columns, dtype=torch.bool)
    for line, (number, order) in enumerate(zip(count.tolist(), which.tolist(), strict=True)):
        assert order[:number] == sorted(order[:number])
        found[line, order[:number]] = True
    return found


def check(q: Layout, k: Layout, tile: int = TILE) -> tuple[int, int]:
    """Hold the tables of two layouts against the rule; returns how many tiles are full, and how many are in none."""
    pairs, tables = by_tile(rule(q, k), tile), Tables.of(q, k, tile)
    partial, full = listed(tables.keys, tables.key), listed(tables.full_keys, tables.full_key)
    assert torch.equal(listed(tables.queries, tables.query), partial.T)
    assert torch.equal(listed(tables.full_queries, tables.full_query), full.T)
    assert not (partial & full).any()
    assert pairs[full].all() and not pairs[~(partial | full)].any()
    return int(full.sum()), int((~(partial | full)).sum())


def any_layout(rng: np.random.Generator, length: int, groups: int, blocks: int, run: int) -> Layout:
    """Any numbers at all, in runs of equal ones, padding in between."""

    def column(low: int, high: int) -> Tensor:
        drawn = np.repeat(rng.integers(low, high, length), rng.integers(1, run + 1, length))[:length]
        return torch.from_numpy(drawn.astype(np.int32))

    return Layout(column(-1, groups), column(-1, 2), column(0, 3), column(0, blocks), torch.zeros(length).int())


@pytest.mark.parametrize("piece", [4, 8, 32])
def test_any_layout_and_any_pair_of_layouts(monkeypatch, piece: int) -> None:
    monkeypatch.setattr(tiles, "PIECE", piece)
    rng, full, none = np.random.default_rng(piece), 0, 0
    for _ in range(25):
        groups, blocks, run = int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.integers(1, 40))
        q, k = (any_layout(rng, TILE * int(rng.integers(2, 9)), groups, blocks, run) for _ in range(2))
        for one, other in ((q, q), (q, k)):
            found = check(one, other)
            full, none = full + found[0], none + found[1]
    assert full > 20 and none > 100


@pytest.mark.parametrize("block", [1, 4, 8, None])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_shared_prompts_and_ragged_traces(monkeypatch, block: int | None, causal: bool) -> None:
    monkeypatch.setattr(tiles, "PIECE", 4)
    for seed in range(3):
        layout = whole(ragged_row(seed, Grid(block), longest=12 if block is None else 40, causal=causal).layout)
        _, none = check(layout, layout)
        assert none > 0


@pytest.mark.parametrize("shift", [0, 1])
def test_parts_of_rows_under_context_parallelism(monkeypatch, shift: int) -> None:
    monkeypatch.setattr(tiles, "PIECE", 4)
    for seed in range(3):
        row = ragged_row(seed, Grid(4), longest=40, causal=seed == 1)
        length = shared_length(len(row.tokens), 2, 4, TILE)
        for rank in range(2):
            part, _ = share_row(row, 2, rank, length, PAD_ID, shift)
            clean, own = part.context.clean, part.layout
            names = [field.name for field in dataclasses.fields(Layout)]
            keys = Layout(*(torch.cat([getattr(clean, name), getattr(own, name)]) for name in names))
            full, none = check(whole(own), whole(keys))
            assert full > 0 and none > 0


def test_a_long_row_has_few_tiles_for_nothing() -> None:
    """At the sizes of kernels: at most a tenth more tiles than needed, and every full tile is known to be full."""
    rng = np.random.default_rng(0)
    traces = random_group(300, [310, 450, 250], 4, rng)
    items = [trace_item(trace, Grid(4)) for trace in traces]
    layout = whole(build_row(list(enumerate(items)), 5120, MASK_ID, PAD_ID).layout, 128)
    pairs = by_tile(rule(layout, layout), 128)
    some, full = classes(layout, layout, 128)
    assert torch.equal(full, pairs.all(3).all(2))
    assert not (pairs.any(3).any(2) & ~some).any()
    assert some.sum() <= 1.1 * pairs.any(3).any(2).sum() and some.sum() < 0.3 * some.numel()
