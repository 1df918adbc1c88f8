from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item, Views, largest_part, split_views, trace_views
from tests.diffusion.oracles import MASK_ID, PAD_ID, block_index, masked_views, random_trace, states

GRIDS = [Grid(size, anchor) for size in (1, 2, 4, 8) for anchor in ("absolute", "response")] + [Grid(None)]


def as_sets(views: Views) -> list[tuple[int, frozenset[int], frozenset[int], frozenset[int]]]:
    """(block, positions, masked positions, predicted positions) per view."""
    return [
        (
            int(views.block[i]),
            *(
                frozenset(views.position[i][keep & (views.position[i] >= 0)].tolist())
                for keep in (np.ones_like(views.masked[i]), views.masked[i], views.target[i])
            ),
        )
        for i in range(len(views.block))
    ]


def spec_trace(steps: list[int], prompt_length: int = 4) -> Trace:
    trace = random_trace(prompt_length, len(steps), 4, np.random.default_rng(0))
    trace.steps = np.array(steps)
    return trace


def rounds(views: Views, prompt_length: int, length: int) -> list[tuple[set[int], set[int]]]:
    """Views merged into rounds, the r-th view of every block; (masked, predicted) as response offsets."""
    seen: dict[int, int] = {}
    rows: list[tuple[set[int], set[int]]] = []
    for block, _, masked, predicted in as_sets(views):
        r = seen[block] = seen.get(block, -1) + 1
        if r == len(rows):
            rows.append((set(), set()))
        rows[r][0].update(p - prompt_length for p in masked)
        rows[r][1].update(p - prompt_length for p in predicted)
    return rows


@pytest.mark.parametrize(
    "shrinkage, expected",
    [
        (1, [("MMMMMMMM", {0, 2, 4, 5}), ("0M2M45MM", {1, 6}), ("012M456M", {3, 7})]),
        (2, [("MMMMMMMM", {0, 1, 2, 4, 5, 6}), ("012M456M", {3, 7})]),
    ],
)
def test_the_rows_of_the_reference(shrinkage: int, expected: list[tuple[str, set[int]]]) -> None:
    """Step map and rows of the published implementation of TraceRL, for blocks of 4."""
    trace = spec_trace([1, 2, 1, 3, 4, 4, 5, 6])
    got = rounds(trace_views(trace, Grid(4), shrinkage), 4, 12)
    assert got == [({i for i, shown in enumerate(text) if shown == "M"}, loss) for text, loss in expected]


def test_full_attention_has_one_view_per_step_of_the_whole_response() -> None:
    """Everything that is decided later is masked, the blocks after this one included."""
    trace = spec_trace([1, 2, 1, 3, 4, 4, 5, 6])
    trace.sampling = dataclasses.replace(trace.sampling, max_new_tokens=8)
    got = rounds(trace_views(trace, Grid(None), 1), 4, 12)
    assert got == [
        (set(range(8)), {0, 2}),
        ({1, 3, 4, 5, 6, 7}, {1}),
        ({3, 4, 5, 6, 7}, {3}),
        ({4, 5, 6, 7}, {4, 5}),
        ({6, 7}, {6}),
        ({7}, {7}),
    ]
    got = rounds(trace_views(trace, Grid(None), 4), 4, 12)
    assert got == [(set(range(8)), {0, 1, 2, 3, 4, 5}), ({6, 7}, {6, 7})]


def canvas_trace(horizon: int | None) -> Trace:
    """Two decoding blocks of 4 behind a prompt of 2, the response ends in the second: up to 11 tokens were allowed."""
    trace = random_trace(2, 6, 4, np.random.default_rng(0), full=True, behind=3, horizon=horizon)
    trace.steps, trace.tail_steps = np.array([1, 2, 1, 3, 4, 5]), np.array([5, 6])
    return trace


def test_under_full_attention_the_canvas_is_shown_to_its_end() -> None:
    views = trace_views(canvas_trace(None), Grid(None))
    assert [(min(shown), max(shown), len(shown)) for _, shown, _, _ in as_sets(views)] == [(0, 12, 13)] * 5
    assert [({p - 2 for p in masked}, {p - 2 for p in target}) for _, _, masked, target in as_sets(views)] == [
        (set(range(11)), {0, 2}),
        (set(range(11)) - {0, 2}, {1}),
        (set(range(11)) - {0, 1, 2}, {3}),
        (set(range(4, 11)), {4}),
        ({5, 6, 7, 8, 9, 10}, {5}),
    ]


@pytest.mark.parametrize("horizon, ends", [(0, [11, 4, 4, 11, 8]), (2, [11, 6, 6, 11, 10]), (5, [11, 9, 9, 11, 11])])
def test_steps_behind_the_first_of_a_block_see_to_the_horizon(horizon: int, ends: list[int]) -> None:
    views = trace_views(canvas_trace(horizon), Grid(None))
    assert [len(shown) - 2 for _, shown, _, _ in as_sets(views)] == ends
    assert views.sizes.tolist() == [end + 2 for end in ends]
    assert not (views.masked & (views.position < 0)).any()
    assert Item("g", canvas_trace(horizon).tokens, 2, views, Grid(None)).own_length == sum(ends) + 10


def test_merged_steps_see_what_one_of_them_saw() -> None:
    """Steps 1 and 2, 3 and 4, 5 and 6: of each pair but the last one was the first of its block."""
    views = trace_views(canvas_trace(0), Grid(None), 2)
    assert [len(shown) - 2 for _, shown, _, _ in as_sets(views)] == [11, 11, 8]
    assert views.num_targets == 6


@pytest.mark.parametrize("shrinkage", [1, 2, 3])
@pytest.mark.parametrize("horizon", [None, 0, 1, 3, 50])
@pytest.mark.parametrize("behind", [0, 1, 9])
def test_views_of_a_canvas_against_the_states_of_the_rollout(behind: int, horizon: int | None, shrinkage: int) -> None:
    rng = np.random.default_rng(behind)
    for prompt in range(5):
        for block in (1, 3, 4, 32):
            trace = random_trace(
                prompt, int(rng.integers(1, 14)), block, rng, full=True, behind=behind, horizon=horizon
            )
            views = trace_views(trace, Grid(None), shrinkage)
            assert as_sets(views) == [
                (
                    0,
                    frozenset(range(len(state.shown))),
                    frozenset(p for p, token in enumerate(state.shown) if token == MASK_ID),
                    frozenset(state.decided),
                )
                for state in states(trace, Grid(None), shrinkage)
            ]
            assert views.num_targets == len(trace.response_ids)


def test_tokens_of_older_weights_are_context() -> None:
    trace = spec_trace([1, 2, 1, 3, 4, 4, 5, 6])
    trace.weight_versions = np.array([1, 1, 1, 1, 2, 2, 2, 2])
    every = as_sets(trace_views(trace, Grid(4)))
    assert as_sets(trace_views(trace, Grid(4), oldest_version=1)) == every
    young = [view for view in every if min(view[3]) >= 8]
    assert as_sets(trace_views(trace, Grid(4), oldest_version=2)) == young and len(young) == 3
    none = trace_views(trace, Grid(4), oldest_version=3)
    assert none.num_targets == 0 and len(none.block) == 0


@pytest.mark.parametrize("shrinkage", [1, 2, 3])
@pytest.mark.parametrize("decode_block", [1, 2, 4, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_trace_views_against_the_states_of_the_rollout(grid: Grid, decode_block: int, shrinkage: int) -> None:
    rng = np.random.default_rng(decode_block)
    for prompt_length in range(0, 2 * (grid.block_size or 4) + 1):
        trace = random_trace(prompt_length, int(rng.integers(1, 18)), decode_block, rng)
        views = trace_views(trace, grid, shrinkage)
        length = len(trace.tokens)
        if grid.block_size is None:
            length = prompt_length + trace.sampling.max_new_tokens
        elif grid.anchor == "absolute":  # a block larger than those of the rollout is shown whole
            length += -length % grid.block_size
        block_of = [block_index(p, prompt_length, grid) for p in range(length)]
        first_ours = int(grid.block_of(0, prompt_length))
        expected = [
            (
                state.block + first_ours,
                frozenset(p for p, b in enumerate(block_of) if b == state.block),
                frozenset(p for p, token in enumerate(state.shown) if token == MASK_ID),
                frozenset(state.decided),
            )
            for state in states(trace, grid, shrinkage)
        ]
        assert as_sets(views) == expected
        predicted = sorted(p for _, _, _, target in as_sets(views) for p in target)
        assert predicted == list(range(prompt_length, prompt_length + len(trace.response_ids)))
        assert views.num_targets == len(trace.response_ids)
        assert (views.weight == 1).all() and views.weight.shape == views.position.shape
        assert not (views.target & ~views.masked).any() and not (views.masked & (views.position < prompt_length)).any()


def test_a_view_of_the_tail_alone_is_not_made() -> None:
    trace = random_trace(4, 2, 4, np.random.default_rng(0))
    trace.steps, trace.tail_steps = np.array([1, 1]), np.array([2, 3])
    assert as_sets(trace_views(trace, Grid(4))) == [
        (1, frozenset({4, 5, 6, 7}), frozenset({4, 5, 6, 7}), frozenset({4, 5}))
    ]


def test_the_tail_is_seen_where_it_was_seen_and_never_predicted() -> None:
    trace = random_trace(4, 2, 4, np.random.default_rng(0))
    trace.steps, trace.tail_steps = np.array([1, 3]), np.array([2, 4])
    assert [(masked, target) for _, _, masked, target in as_sets(trace_views(trace, Grid(4)))] == [
        ({4, 5, 6, 7}, {4}),
        ({5, 7}, {5}),
    ]


def test_making_views_leaves_the_trace_alone() -> None:
    trace = random_trace(5, 12, 4, np.random.default_rng(0))
    before = trace.all_steps.copy()
    trace_views(trace, Grid(4), 2)
    assert (trace.all_steps == before).all()


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, "response"), Grid(None)], ids=str)
@pytest.mark.parametrize("prompt_length", [0, 3, 4])
def test_an_empty_response_has_no_views(grid: Grid, prompt_length: int) -> None:
    """An aborted request: nothing was decided, nothing is learned."""
    trace = random_trace(prompt_length, 0, 1, np.random.default_rng(0))
    views = trace_views(trace, grid)
    assert views.num_targets == 0 and len(views.block) == 0


@pytest.mark.parametrize("per", ["block", "sample"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masked_views_against_one_token_at_a_time(grid: Grid, per: str) -> None:
    schedule, rng = MaskSchedule(per), np.random.default_rng(7)
    for prompt_length in range(0, 2 * (grid.block_size or 4) + 1):
        length = prompt_length + int(rng.integers(1, 18))
        predict_until = int(rng.integers(prompt_length, length + 1))
        key = stream(0, "mask", prompt_length)
        views = masked_views(prompt_length, length, grid, schedule, key, predict_until)
        block_of = [block_index(p, prompt_length, grid) for p in range(length)]
        first_ours = int(grid.block_of(0, prompt_length))
        hidden, weight = {}, {}
        for p in range(prompt_length, length):
            one = schedule.draw(key, torch.tensor([p]), torch.tensor([block_of[p] + first_ours]))
            hidden[p], weight[p] = bool(one[0]), float(one[1])
        expected = []
        for block in sorted(set(block_of[prompt_length:])):
            mine = [p for p in range(length) if block_of[p] == block]
            masked = frozenset(p for p in mine if hidden.get(p))
            target = frozenset(p for p in masked if p < predict_until)
            if target:
                expected.append((block + first_ours, frozenset(mine), masked, target))
        assert as_sets(views) == expected
        for i in range(len(views.block)):
            for j in np.flatnonzero(views.target[i]):
                assert views.weight[i, j] == weight[int(views.position[i, j])]


def make_item(grid: Grid, trace: Trace) -> Item:
    return Item("g", trace.tokens, len(trace.prompt_ids), trace_views(trace, grid), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_an_item_asks_of_a_row(grid: Grid) -> None:
    rng = np.random.default_rng(3)
    for prompt_length in range(0, 2 * (grid.block_size or 4) + 1):
        trace = random_trace(prompt_length, int(rng.integers(1, 18)), grid.block_size or 4, rng)
        item = make_item(grid, trace)
        length = len(trace.tokens)
        if grid.block_size is None:
            length = prompt_length + trace.sampling.max_new_tokens
        elif grid.anchor == "absolute":  # a block larger than those of the rollout is shown whole
            length += -length % grid.block_size
        block_of = [block_index(p, prompt_length, grid) for p in range(length)]
        found = states(trace, grid)
        first, last = block_of[prompt_length], max(state.block for state in found)
        shared = [p for p in range(prompt_length) if block_of[p] < first]
        clean = [p for p in range(len(trace.tokens)) if first <= block_of[p] < last]
        noisy = sum(block_of.count(state.block) for state in found)
        assert item.shared_length == len(shared)
        assert item.clean_end == len(shared) + len(clean)
        assert item.own_length == len(clean) + noisy


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, "response"), Grid(None)], ids=str)
def test_an_item_for_which_no_mask_was_drawn_asks_for_nothing(grid: Grid) -> None:
    """Short answers and small ratios: it happens in every epoch."""
    keys = (stream(0, "mask", item) for item in range(1000))
    views = next(v for key in keys if not len((v := masked_views(5, 7, grid, MaskSchedule(), key, 7)).block))
    assert Item("g", np.arange(7), 5, views, grid).own_length == 0


# A split item ---------------------------------------------------------------------------------------------------------


def needs(item: Item) -> int:
    return item.shared_length + item.own_length


def asked(items: list[Item]) -> list[tuple]:
    """What is predicted, view by view: the number of its first token, the text that it shows and its targets."""
    found = []
    for item in items:
        for view in range(len(item.views.block)):
            part = dataclasses.replace(item, views=item.views.chosen(slice(view, view + 1)))
            row = build_row([(7, part)], needs(part), MASK_ID, PAD_ID)
            targets = zip(*(getattr(row.targets, name).tolist() for name in ("label", "weight", "response", "index")))
            found.append((row.tokens.tolist(), row.layout.position.tolist(), list(targets)))
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_split_item_asks_for_the_same_in_rows_that_hold_it(grid: Grid) -> None:
    rng, split = np.random.default_rng(5), 0
    for prompt_length in range(0, 2 * (grid.block_size or 4) + 1):
        size = grid.block_size or 4
        trace = random_trace(prompt_length, int(rng.integers(4, 18)), size, rng, full=grid.block_size is None)
        item = make_item(grid, trace)
        least, whole = largest_part(item), needs(item)
        assert least <= whole
        for budget in {least, least + 1, (least + whole) // 2, whole - 1, whole, whole + 1}:
            parts = split_views(item, budget)
            assert (len(parts) == 1) == (budget >= whole or len(item.views.block) == 1)
            if budget >= least:
                assert max(needs(part) for part in parts) <= budget
            assert all(part.views.num_targets for part in parts)
            assert sum(part.views.num_targets for part in parts) == item.views.num_targets
            for part in parts:
                assert (part.group, part.prompt_length, part.grid) == (item.group, item.prompt_length, item.grid)
                assert part.tokens is item.tokens
            assert asked(parts) == asked([item])
            end = 0
            for part in parts[:-1]:  # nothing is cut that would have fitted
                start, end = end, end + len(part.views.block)
                assert needs(dataclasses.replace(item, views=item.views.chosen(slice(start, end + 1)))) > budget
            split += len(parts) > 2
    assert split > 3


def test_full_attention_pays_nothing_for_a_split() -> None:
    item = make_item(Grid(None), random_trace(3, 11, 4, np.random.default_rng(0), full=True))
    parts = split_views(item, largest_part(item))
    assert largest_part(item) == 3 + 12 + 3 and len(parts) == len(item.views.block) > 3
    assert sum(needs(part) for part in parts) == needs(item)


def test_a_view_that_fits_no_row_stands_alone() -> None:
    """Whoever packs it refuses it, by its size."""
    item = make_item(Grid(None), random_trace(3, 11, 4, np.random.default_rng(0), full=True))
    assert {needs(part) for part in split_views(item, 5)} == {largest_part(item)}


def test_an_item_without_views_is_left_whole() -> None:
    item = make_item(Grid(4), random_trace(5, 0, 1, np.random.default_rng(0)))
    assert split_views(item, 0) == [item] and item.own_length == 0
