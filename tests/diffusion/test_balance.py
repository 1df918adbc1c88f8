from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.layout import PROMPT, Grid, visible
from megatron_dlm.diffusion.planner import Load, pack, pack_parts
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.views import split_views
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item


@pytest.mark.parametrize("shrinkage", [1, 3])
@pytest.mark.parametrize(
    "grid", [Grid(size, anchor) for size in (1, 4, 8) for anchor in ("absolute", "response")] + [Grid(None)], ids=str
)
def test_areas_are_those_of_the_visibility_rule(grid: Grid, shrinkage: int) -> None:
    rng = np.random.default_rng(3)
    for prompt in (1, 4, 9):
        for trace in random_group(prompt, [1, 5, 13], 4, rng):
            item = trace_item(trace, grid, shrinkage)
            for part in [item, *split_views(item, item.shared_length + item.own_length - 1)]:
                load = load_of(part)
                assert (load.shared, load.own) == (part.shared_length, part.own_length)
                row = build_row([(0, part)], load.shared + load.own, MASK_ID, PAD_ID)
                seen = visible(row.layout, row.layout).sum(1)
                of_prompt = row.layout.response == PROMPT
                assert load.shared_area == seen[of_prompt].sum() and load.own_area == seen[~of_prompt].sum()


def areas(plan, loads: list[Load]) -> np.ndarray:
    """Of each row of each rank."""

    def of_row(row):
        return sum({loads[i].group: loads[i].shared_area for i in row}.values()) + sum(loads[i].own_area for i in row)

    return np.array([[of_row(row) for row in rows] for rows in plan.ranks])


def long_and_short(seed: int) -> list[Load]:
    """Rows may have as many tokens and very different attention."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(300, 1000, 24), *rng.integers(20, 120, 100)]
    return [Load(f"g{n}", 0, int(length), 0, int(length) ** 2 // 2) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_have_about_the_same_attention(seed: int) -> None:
    loads = long_and_short(seed)
    rows = areas(pack(loads, 2048, 4, 64), loads)
    by_tokens = [Load(one.group, one.shared, one.own) for one in loads]
    blind = areas(pack(by_tokens, 2048, 4, 64), loads)
    assert rows.sum(1).max() < 1.04 * rows.sum(1).mean()
    assert rows.sum(1).max() < blind.sum(1).max() and rows.max() < blind.max()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_balance_costs_no_tokens_and_no_rows(seed: int, together: bool) -> None:
    rng = np.random.default_rng(seed)
    items = [
        [Load(f"g{n // 3}", 7, int(own), 30, int(own) * int(rng.integers(1, 500))) for own in rng.integers(1, 60, 2)]
        for n in range(20)
    ]
    blind = [[Load(one.group, one.shared, one.own) for one in parts] for parts in items]
    plan, other = pack_parts(items, 200, 3, 8, together), pack_parts(blind, 200, 3, 8, together)
    assert (plan.length, plan.num_rows) == (other.length, other.num_rows)
    found = sorted(
        pair for rows, parts in zip(plan.ranks, plan.parts) for row, part in zip(rows, parts) for pair in zip(row, part)
    )
    assert found == [(n, part) for n in range(20) for part in range(2)]


@pytest.mark.parametrize("together", [False, True])
def test_interleaved_stages_get_rounds_of_rows(together: bool) -> None:
    for count in (1, 5, 23):
        items = [[Load(f"g{n}", 3, 20)] for n in range(count)]
        plan = pack_parts(items, 50, 2, 8, together, rows_multiple=4)
        assert plan.tokens == 23 * count
        assert all(len(rows) % 4 == 0 for rows in plan.ranks) and len({len(rows) for rows in plan.ranks}) == 1
        assert sorted(n for rows in plan.ranks for row in rows for n in row) == list(range(count))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("groups, samples", [(2, 16), (10, 8), (3, 5)])
def test_rounds_of_rows_are_filled_and_not_made_of_padding(groups: int, samples: int, together: bool) -> None:
    """Two ranks, rounds of four rows: whole groups would leave most of the rows empty."""
    items = [[Load(f"g{group}", 200, 1000, 0, 1)] for group in range(groups) for _ in range(samples)]
    alone = pack_parts(items, 16384, 2, 64, together)
    rounds = pack_parts(items, 16384, 2, 64, together, rows_multiple=4)
    assert rounds.num_rows * rounds.length < 1.6 * alone.num_rows * alone.length
