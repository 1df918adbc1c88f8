from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import CLEAN, Grid, visible
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item
from tests.diffusion.oracles import (
    MASK_ID,
    PAD_ID,
    VOCAB,
    expected_fingerprints,
    fingerprints,
    masked_views,
    random_group,
    random_trace,
    row_fingerprints,
    states,
    trace_item,
    visibility,
)

GRIDS = [Grid(size, anchor) for size in (1, 2, 4, 8) for anchor in ("absolute", "response")] + [Grid(None)]


def used(items: list[Item]) -> int:
    """Tokens that the items need together, each group's prompt once."""
    return sum({item.group: item.shared_length for item in items}.values()) + sum(item.own_length for item in items)


def build(items: list[Item], padding: int = 3) -> Row:
    return build_row(list(enumerate(items)), used(items) + padding, MASK_ID, PAD_ID)


def check(traces: list[Trace], grid: Grid, shrinkage: int = 1) -> None:
    """Every response token is a target once, with its label, and knows just what the rollout knew on deciding it."""
    row = build([trace_item(trace, grid, shrinkage) for trace in traces])
    expected = {
        (i, index): print_
        for i, trace in enumerate(traces)
        for index, print_ in expected_fingerprints(trace, grid, shrinkage).items()
    }
    assert sorted(expected) == [(i, j) for i, trace in enumerate(traces) for j in range(len(trace.response_ids))]
    assert row_fingerprints(row) == expected
    labels = [int(traces[i].response_ids[j]) for i, j in zip(row.targets.response.tolist(), row.targets.index.tolist())]
    assert row.targets.label.tolist() == labels
    assert (row.tokens[row.targets.slot] == MASK_ID).all()
    assert (row.targets.weight == 1).all()


def test_a_row_of_one_block_is_readable() -> None:
    trace = random_trace(4, 4, 4, np.random.default_rng(0))
    trace.steps = np.array([1, 2, 1, 2])
    row = build([trace_item(trace, Grid(4))], padding=2)
    p, r, m = trace.prompt_ids.tolist(), trace.response_ids.tolist(), MASK_ID
    assert row.tokens.tolist() == p + [m, m, m, m] + [r[0], m, r[2], m] + [PAD_ID] * 2
    assert row.layout.group.tolist() == [0] * 12 + [-1] * 2
    assert row.layout.response.tolist()[:12] == [-1] * 4 + [0] * 8
    assert row.layout.view.tolist()[:12] == [0] * 4 + [1] * 4 + [2] * 4
    assert row.layout.block.tolist()[:12] == [0] * 4 + [1] * 8
    assert row.layout.position.tolist()[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert list(zip(row.targets.slot.tolist(), row.targets.label.tolist(), row.targets.index.tolist())) == [
        (4, r[0], 0),
        (6, r[2], 2),
        (9, r[1], 1),
        (11, r[3], 3),
    ]


def test_types() -> None:
    row = build([trace_item(random_trace(5, 6, 4, np.random.default_rng(0)), Grid(4))])
    assert row.tokens.dtype == torch.int64 and row.layout.block.dtype == torch.int32
    assert (
        row.targets.slot.dtype
        == row.targets.label.dtype
        == row.targets.index.dtype
        == row.targets.response.dtype
        == torch.int64
    )
    assert row.targets.weight.dtype == torch.float64
    assert row.to(torch.device("cpu")).targets.slot.equal(row.targets.slot)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_target_knows_what_the_rollout_knew(grid: Grid) -> None:
    rng = np.random.default_rng(11)
    for prompt_length in range(0, 2 * (grid.block_size or 4) + 1):
        check([random_trace(prompt_length, int(rng.integers(1, 14)), grid.block_size or 4, rng)], grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_responses_that_share_a_prompt(grid: Grid) -> None:
    rng = np.random.default_rng(12)
    for prompt_length in range(0, (grid.block_size or 4) + 2):
        for lengths in ([5, 9], [1, 4, 7]):
            check(random_group(prompt_length, lengths, grid.block_size or 4, rng), grid)


@pytest.mark.parametrize(
    "decode_block, attention_block", [(4, 8), (8, 4), (1, 4), (4, 1), (2, 8), (8, None), (4, None), (3, 4)]
)
@pytest.mark.parametrize("anchor", ["absolute", "response"])
def test_training_with_another_block_size(decode_block: int, attention_block: int | None, anchor: str) -> None:
    rng = np.random.default_rng(13)
    for prompt_length in range(0, 9):
        for shrinkage in (1, 2):
            check(
                random_group(prompt_length, [int(rng.integers(1, 14)), 6], decode_block, rng),
                Grid(attention_block, anchor),
                shrinkage,
            )


@pytest.mark.parametrize("grid", [Grid(4), Grid(8, "response"), Grid(None)], ids=str)
@pytest.mark.parametrize("shrinkage", [2, 3, 8])
def test_shrunk_steps(grid: Grid, shrinkage: int) -> None:
    rng = np.random.default_rng(14)
    for prompt_length in range(0, 9):
        check(random_group(prompt_length, [7, 12], grid.block_size or 4, rng), grid, shrinkage)


def mixed_items(seed: int, grid: Grid) -> list[tuple[Trace, Item]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(3):
        lengths = rng.integers(1, 12, rng.integers(1, 4)).tolist()
        for trace in random_group(int(rng.integers(0, 10)), lengths, 4, rng, prompt_key=f"p{number}"):
            pairs.append((trace, trace_item(trace, grid)))
    return pairs


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, "response"), Grid(None)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_company_matter(seed: int, grid: Grid) -> None:
    pairs = mixed_items(seed, grid)
    expected = {
        (i, index): print_
        for i, (trace, _) in enumerate(pairs)
        for index, print_ in expected_fingerprints(trace, grid).items()
    }
    rng = np.random.default_rng(seed)
    for cut in (len(pairs), 2, 1):
        order, got = rng.permutation(len(pairs)).tolist(), {}
        for start in range(0, len(order), cut):
            together = [(i, pairs[i][1]) for i in order[start : start + cut]]
            row = build_row(together, used([item for _, item in together]) + 2, MASK_ID, PAD_ID)
            got |= row_fingerprints(row)
        assert got == expected


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_stored_token_is_read_and_the_length_is_the_stated_one(grid: Grid) -> None:
    rng = np.random.default_rng(15)
    for prompt_length in range(0, (grid.block_size or 4) + 2):
        items = [
            trace_item(trace, grid)
            for trace in random_group(prompt_length, [5, int(rng.integers(1, 12))], grid.block_size or 4, rng)
        ]
        row = build(items, padding=0)
        assert (row.layout.group >= 0).all()
        mask = visibility(row.layout)
        at_targets = mask[row.targets.slot.numpy()].any(0)
        clean = (row.layout.view == CLEAN).numpy()
        assert at_targets[clean].all(), "a clean token is stored that no target reads"
        with_target = {
            (r, v)
            for r, v in zip(row.layout.response[row.targets.slot].tolist(), row.layout.view[row.targets.slot].tolist())
        }
        views = {(r, v) for r, v in zip(row.layout.response.tolist(), row.layout.view.tolist()) if v != CLEAN}
        assert views == with_target
        keys = list(
            zip(*(getattr(row.layout, name).tolist() for name in ("group", "response", "view", "block", "position")))
        )
        assert len(set(keys)) == len(keys), "a token is stored twice"


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_padding_slots(padding: int) -> None:
    items = [item for _, item in mixed_items(0, Grid(4))]
    row = build(items, padding)
    length = used(items)
    assert row.tokens.numel() == length + padding and row.tokens[length:].tolist() == [PAD_ID] * padding
    assert row.layout.group[length:].tolist() == [-1] * padding
    assert (row.targets.slot < length).all()
    mask = visible(row.layout, row.layout)
    assert mask[length:].equal(torch.eye(length + padding).bool()[length:]) and not mask[:length, length:].any()
    assert mask.diagonal().all()


def test_a_row_without_items_is_padding() -> None:
    row = build_row([], 16, MASK_ID, PAD_ID)
    assert row.tokens.tolist() == [PAD_ID] * 16 and row.layout.group.tolist() == [-1] * 16
    assert row.targets.slot.numel() == row.targets.label.numel() == row.targets.weight.numel() == 0
    assert row.targets.weight.dtype == torch.float64 and row.targets.slot.dtype == torch.int64


def test_a_row_that_is_too_short_is_refused() -> None:
    item = trace_item(random_trace(5, 6, 4, np.random.default_rng(0)), Grid(4))
    with pytest.raises(ValueError, match="do not fit"):
        build_row([(0, item)], used([item]) - 1, MASK_ID, PAD_ID)


def test_ids_are_those_of_the_caller() -> None:
    items = [item for _, item in mixed_items(1, Grid(4))]
    row = build_row([(100 + i, item) for i, item in enumerate(items)], used(items), MASK_ID, PAD_ID)
    assert sorted(set(row.targets.response.tolist())) == [100 + i for i in range(len(items))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masked_views_in_a_row(grid: Grid) -> None:
    """Fine-tuning against one sequence per block: what is before it, finished, then the block with its masks."""
    rng = np.random.default_rng(16)
    for prompt_length in range(0, (grid.block_size or 4) + 2):
        tokens = rng.integers(0, VOCAB, prompt_length + 11)
        views = masked_views(
            prompt_length,
            len(tokens),
            grid,
            MaskSchedule(min_ratio=0.3),
            stream(0, "mask", prompt_length),
            prompt_length + 9,
        )
        if not len(views.block):
            continue
        item = Item("g", tokens, prompt_length, views, grid)
        got = row_fingerprints(row := build([item]))
        expected = {}
        for i in range(len(views.block)):
            start, end = (
                int(p) for p in (views.position[i][views.position[i] >= 0].min(), views.position[i].max() + 1)
            )
            shown = tokens[:end].copy()
            shown[views.position[i][views.masked[i]]] = MASK_ID
            block = np.array([grid.block_of(p, prompt_length) for p in range(end)])
            prints = fingerprints(shown, np.arange(end), block[None, :] <= block[:, None])
            expected |= {(0, int(p) - prompt_length): int(prints[p]) for p in views.position[i][views.target[i]]}
        assert got == expected
        for slot, label, weight, index in zip(
            *(getattr(row.targets, name).tolist() for name in ("slot", "label", "weight", "index"))
        ):
            where = views.target & (views.position == prompt_length + index)
            assert label == tokens[prompt_length + index] and weight == views.weight[where].item() and index < 9


class Network(torch.nn.Module):
    """Two attention layers in float64, positions in the embedding: enough to tell any two contexts apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = torch.nn.Embedding(VOCAB + 2, 16), torch.nn.Embedding(64, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 64) for _ in range(2))
        self.head = torch.nn.Linear(16, VOCAB)
        self.double()

    def forward(self, tokens: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(position)
        for layer in self.layers:
            q, k, v, gate = layer(x).chunk(4, -1)
            x = x + ((q @ k.T / math.sqrt(16)).masked_fill(~mask, float("-inf")).softmax(-1) @ v) * gate.tanh()
        return self.head(x).log_softmax(-1)


@pytest.mark.parametrize("shrinkage", [1, 2])
@pytest.mark.parametrize("grid", [Grid(1), Grid(4), Grid(8), Grid(4, "response"), Grid(None)], ids=str)
def test_losses_and_gradients_are_those_of_one_row_per_step(grid: Grid, shrinkage: int) -> None:
    rng = np.random.default_rng(17)
    for prompt_length in (0, 3, 4, 6):
        traces = random_group(prompt_length, [7, 10, 3], 4, rng)
        advantage = torch.from_numpy(rng.normal(size=(3, 10)))
        network = Network()
        row = build([trace_item(trace, grid, shrinkage) for trace in traces])
        logp = network(row.tokens, row.layout.position.long(), visible(row.layout, row.layout))[row.targets.slot]
        chosen = logp.gather(1, row.targets.label[:, None])[:, 0]
        packed = (chosen * advantage[row.targets.response, row.targets.index] * row.targets.weight).sum()
        packed_gradient = torch.autograd.grad(packed, list(network.parameters()))
        naive = torch.zeros((), dtype=torch.float64)
        for i, trace in enumerate(traces):
            for state in states(trace, grid, shrinkage):
                logp = network(
                    torch.tensor(state.shown), torch.arange(len(state.shown)), torch.from_numpy(state.visible)
                )
                for position in state.decided:
                    naive = naive + logp[position, trace.tokens[position]] * advantage[i, position - prompt_length]
        naive_gradient = torch.autograd.grad(naive, list(network.parameters()))
        assert abs(packed - naive) < 1e-11 * abs(naive).clamp(min=1)
        for ours, theirs in zip(packed_gradient, naive_gradient):
            assert (ours - theirs).norm() <= 1e-11 * theirs.norm().clamp(min=1e-3)
