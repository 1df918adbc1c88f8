from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item, Views, masked_views, trace_views
from tests.diffusion.oracles import MASK_ID, block_index, random_trace, states

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
        block_of = [block_index(p, prompt_length, grid) for p in range(len(trace.tokens))]
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
        block_of = [block_index(p, prompt_length, grid) for p in range(len(trace.tokens))]
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
