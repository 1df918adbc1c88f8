from __future__ import annotations

import math
import re

import numpy as np
import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Load, Plan, pack, pack_parts, partition
from megatron_dlm.diffusion.rows import build_row
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item


def row_tokens(loads: list[Load], row: tuple[int, ...]) -> int:
    """What a row really holds: each group's prompt once."""
    return sum({loads[i].group: loads[i].shared for i in row}.values()) + sum(loads[i].own for i in row)


def rows_of(plan: Plan) -> list[tuple[int, ...]]:
    return [row for rank in plan.ranks for row in rank]


def test_one_item_one_row() -> None:
    assert pack([Load("a", 4, 6)], budget=16) == Plan(ranks=(((0,),),), length=10, tokens=10)


def test_a_group_pays_its_prompt_once() -> None:
    plan = pack([Load("a", 10, 5), Load("a", 10, 5), Load("b", 10, 5)], budget=20)
    assert sorted(sorted(row) for row in rows_of(plan)) == [[0, 1], [2]]
    assert plan.length == 20


def test_nothing_to_do() -> None:
    plan = pack([], budget=64, num_ranks=2, multiple_of=16)
    assert plan.length == 16 and len(plan.ranks) == 2 and len({len(rank) for rank in plan.ranks}) == 1
    assert all(row == () for row in rows_of(plan))


@pytest.mark.parametrize("seed", range(60))
def test_random_updates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 40, int(rng.integers(1, 9)))
    loads = []
    for _ in range(int(rng.integers(1, 40))):
        group = int(rng.integers(0, len(shared)))
        loads.append(Load(f"g{group}", int(shared[group]), int(rng.integers(1, 60))))
    num_ranks, multiple = int(rng.integers(1, 5)), int(rng.choice([1, 8, 16]))
    budget = int(rng.integers(max(load.shared + load.own for load in loads), 400))
    plan = pack(loads, budget, num_ranks, multiple)

    rows = rows_of(plan)
    assert sorted(i for row in rows for i in row) == list(range(len(loads)))
    assert len(plan.ranks) == num_ranks and len({len(rank) for rank in plan.ranks}) == 1
    assert plan.num_rows == len(rows)
    sizes = [row_tokens(loads, row) for row in rows]
    assert max(sizes) <= budget
    assert plan.length % multiple == 0 and max(sizes) <= plan.length <= math.ceil(budget / multiple) * multiple
    whole = sum(load.own for load in loads) + sum({load.group: load.shared for load in loads}.values())
    for group in {load.group for load in loads}:
        members = [i for i, load in enumerate(loads) if load.group == group]
        # A group is cut where it exceeds the budget, or a rank's share of the update: other ranks would wait for it.
        if row_tokens(loads, tuple(members)) <= min(budget, whole / num_ranks):
            assert len({n for n, row in enumerate(rows) for i in members if i in row}) == 1, (
                "a group that fits a row and a share was split"
            )
    assert pack(loads, budget, num_ranks, multiple) == plan


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_at_least_half_full(seed: int) -> None:
    """Taking the longest first needs fewer than twice the rows that the tokens fill, but for filling up the ranks."""
    rng = np.random.default_rng(seed)
    loads = [Load(str(i), 0, int(rng.integers(1, 100))) for i in range(50)]
    num_ranks, budget = int(rng.integers(1, 5)), int(rng.integers(100, 300))
    total = sum(load.own for load in loads)
    assert pack(loads, budget, num_ranks).num_rows <= 2 * total / budget + 2 * num_ranks


def test_the_longest_goes_first() -> None:
    plan = pack([Load("a", 0, 4), Load("b", 0, 5), Load("c", 0, 9)], budget=9)
    assert sorted(sorted(row) for row in rows_of(plan)) == [[0, 1], [2]]


def test_the_length_is_no_longer_than_needed() -> None:
    plan = pack([Load("a", 0, 7), Load("b", 0, 3)], budget=1000, num_ranks=2, multiple_of=4)
    assert plan.length == 8 and plan.ranks == (((0,),), ((1,),))


@pytest.mark.parametrize("budget", [6, 7, 100])
def test_rows_that_are_filled_one_by_one_hold_more(budget: int) -> None:
    """3 + 3 and 2 + 2 + 2: into the emptiest row each time, they would need a row of 7, or three of 6."""
    loads = [Load(str(index), 0, own) for index, own in enumerate((3, 2, 3, 2, 2))]
    more = [[load] for load in loads]
    for plan in (pack(loads, budget, num_ranks=2), pack_parts(more, budget, num_ranks=2), pack(loads, 6)):
        assert plan.length == 6 and sorted(map(sorted, (row for rows in plan.ranks for row in rows))) == [
            [0, 2],
            [1, 3, 4],
        ]
    together = pack_parts([[load] for load in loads], 6, together=True)
    assert together.length == 6 and together.num_rows == 2


def test_an_item_that_is_too_long_is_refused_in_a_sentence() -> None:
    loads = [Load("a", 30, 71), Load("b", 0, 5)]
    with pytest.raises(ConfigError) as caught:
        pack(loads, budget=100, multiple_of=16)
    message = str(caught.value)
    assert "--max-tokens-per-row 100" in message and "101" in message and "\n" not in message
    advised = int(re.search(r"at least (\d+)", message).group(1))
    assert advised >= 101
    assert sorted(i for row in rows_of(pack(loads, advised, multiple_of=16)) for i in row) == [0, 1]


def test_an_item_that_just_fits_is_taken() -> None:
    assert pack([Load("a", 30, 70)], budget=100).length == 100


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_items_in_parts(seed: int, together: bool) -> None:
    rng = np.random.default_rng(seed)
    shared, items = rng.integers(0, 20, 4), []
    for _ in range(int(rng.integers(1, 20))):
        group = int(rng.integers(0, 4))
        sizes = rng.integers(1, 60, int(rng.integers(1, 6)))
        items.append([Load(f"g{group}", int(shared[group]), int(size)) for size in sizes])
    num_ranks, multiple = int(rng.integers(1, 5)), int(rng.choice([1, 16]))
    budget = int(rng.integers(80, 300))
    plan = pack_parts(items, budget, num_ranks, multiple, together)
    assert len(plan.ranks) == num_ranks and len({len(rows) for rows in plan.ranks}) == 1
    found, homes, sizes, work = [], {}, [], []
    for rank, (rows, parts_of_rows) in enumerate(zip(plan.ranks, plan.parts, strict=True)):
        work.append(0)
        for row, parts in zip(rows, parts_of_rows, strict=True):
            loads = [items[item][part] for item, part in zip(row, parts, strict=True)]
            found += zip(row, parts)
            sizes.append(row_tokens(loads, tuple(range(len(loads)))))
            work[-1] += sum(load.shared + load.own for load in loads)
            for item in row:
                homes.setdefault(item, set()).add(rank)
    assert sorted(found) == [(item, part) for item, parts in enumerate(items) for part in range(len(parts))]
    assert max(sizes) <= budget and max(sizes) <= plan.length <= math.ceil(budget / multiple) * multiple
    assert pack_parts(items, budget, num_ranks, multiple, together) == plan
    if together:
        assert all(len(ranks) == 1 for ranks in homes.values())
        largest = max(sum(load.shared + load.own for load in parts) for parts in items)
        assert max(work) - min(work) <= largest  # nobody has more to do than another by more than one item


def test_whole_items_are_packed_as_ever() -> None:
    loads = [Load(f"g{i // 4}", 7, 10 + i) for i in range(12)]
    plan, parts = pack(loads, 70, 2), pack_parts([[load] for load in loads], 70, 2)
    assert (parts.ranks, parts.length) == (plan.ranks, plan.length) and plan.parts is None
    assert {part for rows in parts.parts for row in rows for part in row} == {0}


@pytest.mark.parametrize("together", [False, True])
def test_parts_that_are_too_long_are_refused_and_nothing_is_nothing(together: bool) -> None:
    with pytest.raises(ConfigError, match="--max-tokens-per-row 59 is too small: one sample may need 60"):
        pack_parts([[Load("a", 0, 60), Load("a", 0, 9)]], 59, 2, 1, together)
    assert pack_parts([[Load("a", 0, 60), Load("a", 0, 60)]], 60, 1, 1, together).ranks == (((0,), (0,)),)
    assert pack_parts([], 64, 2, 16, together) == Plan((((),), ((),)), 16, (((),), ((),)))


@pytest.mark.parametrize("n", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("num_updates", [1, 2, 4, 8, 50])
def test_partition_covers_everything_in_equal_parts(n: int, num_updates: int) -> None:
    updates = partition(n, num_updates, stream(0, "updates"))
    assert sorted(i for update in updates for i in update) == list(range(n))
    assert len(updates) == min(n, num_updates)
    sizes = [len(update) for update in updates]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_partition_of_nothing_is_no_update() -> None:
    assert partition(0, 4, stream(0, "updates")) == []


def test_partition_shuffles_by_its_key() -> None:
    first = partition(100, 4, stream(0, "updates", 1))
    assert first == partition(100, 4, stream(0, "updates", 1))
    assert first != partition(100, 4, stream(0, "updates", 2))
    assert [i for update in first for i in update] != list(range(100))
    assert len({i // 25 for i in first[0]}) > 1


@pytest.mark.parametrize("grid", [Grid(4), Grid(None)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_rows_can_be_built_as_planned(seed: int, grid: Grid) -> None:
    rng = np.random.default_rng(seed)
    traces = [
        trace
        for number in range(4)
        for trace in random_group(
            int(rng.integers(0, 12)), rng.integers(1, 20, 4).tolist(), 4, rng, prompt_key=f"p{number}"
        )
    ]
    items = [trace_item(trace, grid) for trace in traces]
    loads = [Load(item.group, item.shared_length, item.own_length) for item in items]
    budget = 2 * max(load.shared + load.own for load in loads)
    plan, seen = pack(loads, budget, num_ranks=2, multiple_of=16), []
    for planned in rows_of(plan):
        row = build_row([(i, items[i]) for i in planned], plan.length, MASK_ID, PAD_ID)
        assert int((row.layout.group >= 0).sum()) == row_tokens(loads, planned)
        seen += zip(row.targets.response.tolist(), row.targets.index.tolist())
    assert sorted(seen) == [(i, j) for i, trace in enumerate(traces) for j in range(len(trace.response_ids))]


def test_every_rank_gets_something_of_two_large_groups() -> None:
    loads = [Load(f"g{index // 16}", 20, 50) for index in range(32)]
    plan = pack(loads, 2000, num_ranks=8)
    assert all(any(rows) for rows in plan.ranks) and plan.length < 400
