from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.layout import CLEAN, PADDING, PROMPT, Grid, Layout, predecessors, visible
from megatron_dlm.diffusion.rows import build_row
from tests.diffusion.oracles import MASK_ID, PAD_ID, block_index, random_group, trace_item, visibility


def layout_of(tokens: list[tuple[int, int, int, int, int]]) -> Layout:
    return Layout(*torch.tensor(tokens, dtype=torch.int32).reshape(-1, 5).T.contiguous())


def test_a_token_sees_itself_and_earlier_blocks_only() -> None:
    layout = layout_of([(0, 0, CLEAN, position, position) for position in range(4)])  # block size 1: causal attention
    assert visible(layout, layout).equal(torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_against_a_double_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 60
    tokens = [
        (
            int(rng.integers(-1, 3)),
            int(rng.integers(-1, 3)),
            int(rng.integers(0, 3)),
            int(rng.integers(0, 4)),
            int(rng.integers(0, 16)),
        )
        for _ in range(n)
    ]
    layout = layout_of(tokens)
    expected = visibility(layout)
    assert (visible(layout, layout).numpy() == expected).all()
    other = Layout(*(getattr(layout, name).clone() for name in ("group", "response", "view", "block", "position")))
    expected[np.array([token[0] == -1 for token in tokens])] = False  # between two layouts there is no diagonal
    assert (visible(layout, other).numpy() == expected).all()


def test_padding_sees_only_itself_and_nothing_sees_it() -> None:
    real = [(0, PROMPT, CLEAN, 0, 0), (0, 0, CLEAN, 1, 1), (0, 0, 1, 1, 1)]
    padding = [(PADDING, PROMPT, CLEAN, 0, 0)] * 3
    layout = layout_of(real + padding)
    mask = visible(layout, layout)
    assert mask[3:].equal(torch.eye(6)[3:].bool())
    assert not mask[:3, 3:].any()
    assert mask.diagonal().all()


def test_responses_of_a_group_and_groups_never_meet() -> None:
    tokens = [
        (group, response, view, block, block)
        for group in range(2)
        for response in range(3)
        for view in range(3)
        for block in range(2)
    ]
    tokens += [(group, PROMPT, CLEAN, 0, 0) for group in range(2)]
    layout = layout_of(tokens)
    mask = visible(layout, layout)
    for i, q in enumerate(tokens):
        for j, k in enumerate(tokens):
            if q[0] != k[0] or (q[1] != k[1] and k[1] != PROMPT):
                assert not mask[i, j], (q, k)


def test_a_prompt_that_a_group_shares_never_sees_a_response() -> None:
    tokens = [(0, PROMPT, CLEAN, block, block) for block in range(3)] + [
        (0, 0, CLEAN, block, block) for block in range(3)
    ]
    layout = layout_of(tokens)
    assert not visible(layout, layout)[:3, 3:].any()


VECTOR = """
1.... ...... ......
..111 ...... ......
..111 ...... ......
..111 ...... ......
..111 ...... ......
..111 1111.. ......
..111 1111.. ......
..111 1111.. ......
..111 1111.. ......
..111 111111 ......
..111 111111 ......
..111 ...... 1111..
..111 ...... 1111..
..111 ...... 1111..
..111 ...... 1111..
..111 1111.. ....11
..111 1111.. ....11
"""


def test_the_reference_grid_gives_the_masks_of_the_reference() -> None:
    """Two left pads (no place for them in our rows), three prompt tokens, six response tokens, clean and noisy."""
    published = np.array(
        [[character == "1" for character in line.replace(" ", "")] for line in VECTOR.split("\n") if line]
    )
    published_positions = [1, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7, 8]
    grid, prompt_length = Grid(4, "response"), 3
    prompt, response = np.arange(3), np.arange(3, 9)
    tokens = [(0, PROMPT, CLEAN, int(grid.block_of(p, prompt_length)), int(p)) for p in prompt]
    tokens += [(0, 0, view, int(grid.block_of(p, prompt_length)), int(p)) for view in (CLEAN, 1) for p in response]
    layout = layout_of(tokens)
    assert grid.shared_prompt(prompt_length) == 3
    assert layout.position.tolist() == published_positions[2:]
    assert (visible(layout, layout).numpy() == published[2:, 2:]).all()


@pytest.mark.parametrize("anchor", ["absolute", "response"])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, None])
def test_grid_against_counting(block_size: int | None, anchor: str) -> None:
    grid = Grid(block_size, anchor)
    for prompt_length in range(0, 20):
        length = prompt_length + 21
        by_block: dict[int, list[int]] = {}
        for position in range(length):
            by_block.setdefault(block_index(position, prompt_length, grid), []).append(position)
        blocks = grid.block_of(np.arange(length), prompt_length)
        assert [int(grid.block_of(p, prompt_length)) for p in range(length)] == blocks.tolist()
        first = int(blocks[0])
        for index, positions in by_block.items():
            assert blocks[positions].tolist() == [first + index] * len(positions)
            assert grid.span(first + index, prompt_length, length) == (positions[0], positions[-1] + 1)
        tail = [
            p
            for p in range(prompt_length)
            if block_index(p, prompt_length, grid) == block_index(prompt_length, prompt_length, grid)
        ]
        assert grid.shared_prompt(prompt_length) == prompt_length - len(tail)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_the_absolute_grid_counts_from_position_zero(block_size: int) -> None:
    for prompt_length in range(2 * block_size + 1):
        grid = Grid(block_size)
        assert [grid.block_of(p, prompt_length) for p in range(30)] == [p // block_size for p in range(30)]
        assert grid.shared_prompt(prompt_length) == prompt_length // block_size * block_size


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_the_response_grid_starts_a_block_at_the_first_response_token(block_size: int) -> None:
    for prompt_length in range(1, 2 * block_size + 1):
        grid = Grid(block_size, "response")
        first = grid.block_of(prompt_length, prompt_length)
        assert grid.block_of(prompt_length - 1, prompt_length) == first - 1
        assert [grid.block_of(prompt_length + j, prompt_length) - first for j in range(20)] == [
            j // block_size for j in range(20)
        ]
        assert grid.shared_prompt(prompt_length) == prompt_length


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_staircase_of_a_clean_text_for_every_prompt_length(block_size: int) -> None:
    """Blocks counted from position 0; the prompt's last partial block is seen from both sides."""
    length = 3 * block_size + 3
    for prompt_length in range(0, 2 * block_size + 1):
        grid = Grid(block_size)
        shared = grid.shared_prompt(prompt_length)
        layout = layout_of(
            [(0, PROMPT if p < shared else 0, CLEAN, grid.block_of(p, prompt_length), p) for p in range(length)]
        )
        expected = [[k // block_size <= q // block_size for k in range(length)] for q in range(length)]
        assert visible(layout, layout).tolist() == expected


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_denoising_reads_the_whole_cache_and_its_own_block(block_size: int) -> None:
    """One denoising step, and the pass that commits a block and starts the next one."""
    for prompt_length in range(block_size, 2 * block_size + 1):
        grid = Grid(block_size)
        shared = grid.shared_prompt(prompt_length)

        def tokens(start: int, stop: int, view: int) -> list[tuple[int, int, int, int, int]]:
            return [
                (0, PROMPT if p < shared else 0, view, grid.block_of(p, prompt_length), p) for p in range(start, stop)
            ]

        now, end = shared + 2 * block_size, shared + 3 * block_size
        cache = tokens(0, now, CLEAN)
        query = layout_of(tokens(now, end, 1))
        assert visible(query, layout_of(cache + tokens(now, end, 1))).all()
        query = layout_of(tokens(now, end, CLEAN) + tokens(end, end + block_size, 1))
        mask = visible(query, layout_of(cache + tokens(now, end, CLEAN) + tokens(end, end + block_size, 1)))
        assert mask[:block_size, :end].all() and not mask[:block_size, end:].any()
        assert mask[block_size:].all()


def test_predecessors_by_hand() -> None:
    """A prompt of 3 in blocks of 2, two responses; in the row, noisy copies stand in a muddle."""
    prompt = [(0, PROMPT, CLEAN, 0, 0), (0, PROMPT, CLEAN, 0, 1)]
    first = [(0, 0, CLEAN, 1, 2), (0, 0, CLEAN, 1, 3), (0, 0, 2, 2, 4), (0, 0, 2, 2, 5), (0, 0, 1, 1, 3)]
    first += [(0, 0, 1, 1, 2), (0, 0, 3, 2, 5), (0, 0, 3, 2, 4)]
    second = [(0, 1, 1, 1, 2), (0, 1, 1, 1, 3)]
    other = [(1, 0, 1, 0, 0), (1, 0, 1, 0, 1), (PADDING, PROMPT, CLEAN, 0, 0)]
    layout = layout_of(prompt + first + second + other)
    expected = [0, 0, 1, 2, 3, 4, 7, 1, 9, 3, 1, 10, 12, 12]
    assert predecessors(layout, torch.arange(14)).tolist() == expected
    assert predecessors(layout, torch.tensor([8, 12, 10])).tolist() == [9, 12, 1]
    assert predecessors(layout, torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("block", [1, 2, 4, None])
def test_predecessors_are_seen_and_one_position_before(block: int | None) -> None:
    """Of every target of rows of traces: the only visible token at the position before that is not in another copy."""
    rng, grid = np.random.default_rng(block or 0), Grid(block)
    traces = [trace for n in range(3) for trace in random_group(1 + 2 * n, [3, 6], block or 4, rng, f"p{n}")]
    items = [trace_item(trace, grid) for trace in traces]
    row = build_row(list(enumerate(items)), 600, MASK_ID, PAD_ID)
    found, slots = predecessors(row.layout, row.targets.slot), row.targets.slot
    position, mask = row.layout.position, visible(row.layout, row.layout)
    assert (position[found] == position[slots] - 1).all() and mask[slots, found].all()
    assert ((mask[slots] & (position == position[slots, None] - 1)).sum(1) == 1).all()


def test_to_keeps_every_field() -> None:
    layout = layout_of([(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)])
    moved = layout.to(torch.device("cpu"))
    assert [getattr(moved, name).tolist() for name in ("group", "response", "view", "block", "position")] == [
        [0, 5],
        [1, 6],
        [2, 7],
        [3, 8],
        [4, 9],
    ]
