from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.context import Sharing, deal, share_row, shared_length
from megatron_dlm.diffusion.layout import CLEAN, Grid, Layout, predecessors, visible
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.views import Item, causal_views
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item

GRIDS = [Grid(size, anchor) for size in (1, 2, 4, 8) for anchor in ("absolute", "response")]
COLUMNS = ("group", "response", "view", "block", "position")


def causal_item(trace, name: str) -> Item:
    """A text of its own that is read token by token."""
    prompt, tokens = len(trace.prompt_ids), trace.tokens
    return Item(name, tokens, prompt, causal_views(prompt, len(tokens)), Grid(1))


def row_of(seed: int, grid: Grid, groups: int = 3, longest: int = 14, padding: int = 5, causal: bool = False) -> Row:
    rng = np.random.default_rng(seed)
    traces = [
        trace
        for n in range(groups)
        for trace in random_group(int(rng.integers(1, 12)), rng.integers(1, longest, 3).tolist(), 4, rng, f"p{n}")
    ]
    items = [trace_item(trace, grid) for trace in traces]
    items += [causal_item(trace, f"causal {n}") for n, trace in enumerate(traces[:2] if causal else [])]
    shared = {item.group: item.shared_length for item in items}
    length = sum(shared.values()) + sum(item.own_length for item in items) + padding
    return build_row(list(enumerate(items)), length, MASK_ID, PAD_ID)


def parts_of(row: Row, ranks: int, block_size: int, logit_shift: int = 0) -> list[tuple[Row, torch.Tensor]]:
    length = shared_length(len(row.tokens), ranks, block_size, 4)
    return [share_row(row, ranks, rank, length, PAD_ID, logit_shift) for rank in range(ranks)]


def names(layout: Layout) -> list[tuple[int, ...]]:
    """What no two tokens of a row have in common."""
    return list(zip(*(getattr(layout, column).tolist() for column in COLUMNS)))


def known(queries: Layout, keys: Layout) -> dict[tuple[int, ...], frozenset]:
    """What each token sees, by name."""
    seen, key_names = visible(queries, keys).numpy(), names(keys)
    return {
        name: frozenset(key_names[k] for k in np.flatnonzero(mask))
        for name, mask in zip(names(queries), seen)
        if name[0] >= 0
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_on_one_rank_and_sees_there_what_it_sees_in_the_whole_row(
    seed: int, grid: Grid, ranks: int
) -> None:
    row = row_of(seed, grid, causal=seed == 2)
    parts = parts_of(row, ranks, grid.block_size)
    tokens = [
        (name, token)
        for part, _ in parts
        for name, token in zip(names(part.layout), part.tokens.tolist())
        if name[0] >= 0
    ]
    whole = [(name, token) for name, token in zip(names(row.layout), row.tokens.tolist()) if name[0] >= 0]
    assert sorted(tokens) == sorted(whole)
    expected, found = known(row.layout, row.layout), {}
    for part, _ in parts:
        noisy = part.layout.view != CLEAN
        keys = Layout(
            *(torch.cat([getattr(part.context.clean, name), getattr(part.layout, name)[noisy]]) for name in COLUMNS)
        )
        found |= known(part.layout, keys)
    assert found == expected


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_targets_are_shared_out_and_read_where_the_whole_row_reads_them(ranks: int, shift: int, causal: bool) -> None:
    row = row_of(1, Grid(4), causal=causal)
    slots, before = row.targets.slot, predecessors(row.layout, row.targets.slot)
    finished = row.layout.view[slots] == CLEAN
    assert bool(finished.any()) == causal
    slots = torch.where(finished | bool(shift), before, slots)
    read = [names(row.layout)[slot] for slot in slots.tolist()]
    seen = []
    for part, kept in parts_of(row, ranks, 4, shift):
        seen += kept.tolist()
        assert [names(part.layout)[slot] for slot in part.targets.slot.tolist()] == [read[n] for n in kept.tolist()]
        for name in ("label", "weight", "response", "index"):
            assert torch.equal(getattr(part.targets, name), getattr(row.targets, name)[kept])
    assert sorted(seen) == list(range(len(read)))


def test_the_clean_text_of_a_rank_stands_in_its_part_of_the_exchange() -> None:
    row = row_of(2, Grid(4))
    parts = parts_of(row, 3, 4)
    clean = names(parts[0][0].context.clean)
    for rank, (part, _) in enumerate(parts):
        context = part.context
        assert names(context.clean) == clean and len(clean) == 3 * context.width
        mine = [names(part.layout)[slot] for slot in context.slot.tolist()]
        assert mine == clean[rank * context.width :][: len(mine)]
        rest = clean[rank * context.width + len(mine) : (rank + 1) * context.width]
        assert all(name[0] < 0 for name in rest)
        assert all(name[2] == CLEAN for name in mine)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_long_responses_cost_all_ranks_the_same_though_their_blocks_do_not(ranks: int) -> None:
    rng = np.random.default_rng(0)
    items = [trace_item(trace, Grid(4)) for trace in random_group(40, [700, 90, 30], 4, rng, "p")]
    length = items[0].shared_length + sum(item.own_length for item in items)
    row = build_row(list(enumerate(items)), length, MASK_ID, PAD_ID)
    area = visible(row.layout, row.layout).sum(1).numpy()
    shares = [area[slots].sum() for slots in deal(row.layout, ranks, shared_length(length, ranks, 4, 1))]
    by_length = [part.sum() for part in np.array_split(area, ranks)]
    assert max(shares) < 1.02 * area.sum() / ranks
    assert max(by_length) > 1.1 * area.sum() / ranks


@pytest.mark.parametrize("seed", range(20))
def test_no_rank_gets_more_than_its_share_and_one_block(seed: int) -> None:
    rng = np.random.default_rng(seed)
    block, ranks = int(rng.choice([1, 2, 4, 8])), int(rng.integers(2, 9))
    row = row_of(seed, Grid(block), groups=int(rng.integers(1, 5)), padding=0)
    for slots in deal(row.layout, ranks, shared_length(len(row.tokens), ranks, block, 1)):
        assert len(slots) <= -(-len(row.tokens) // ranks) + block - 1


def test_a_row_of_padding_is_shared_too() -> None:
    row = build_row([], 16, MASK_ID, PAD_ID)
    for part, kept in parts_of(row, 2, 4):
        assert len(part.tokens) == shared_length(16, 2, 4, 4) and (part.layout.group < 0).all()
        assert len(kept) == 0 and part.context.width == 0


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        deal(row_of(0, Grid(4)).layout, 2, 8)


def test_one_rank_has_the_row_itself() -> None:
    row = row_of(0, Grid(4))
    sharing = Sharing(1, 0, 4, 64, PAD_ID)
    assert sharing.part(row) == (row, None) and sharing.length(77) == 77
