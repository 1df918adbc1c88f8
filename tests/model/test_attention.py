from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.layout import Grid, Layout
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.model.attention import DenseAttention
from megatron_dlm.model.rotary import RotaryByPosition
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item, visibility
from tests.tiny import ExplicitAttention


def qkv(tokens: int, heads: int = 4, kv_heads: int = 2, width: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(tokens, 1, count, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )


def row_of(groups: list[tuple[int, list[int]]], padding: int, seed: int = 0):
    """A row of several groups, each (prompt length, response lengths)."""
    rng = np.random.default_rng(seed)
    traces = [
        trace for n, (prompt, lengths) in enumerate(groups) for trace in random_group(prompt, lengths, 4, rng, f"p{n}")
    ]
    items = [trace_item(trace, Grid(4)) for trace in traces]
    tokens = sum(item.own_length for item in items) + sum(prompt - prompt % 4 for prompt, _ in groups)
    return build_row(list(enumerate(items)), tokens + padding, MASK_ID, PAD_ID)


def test_a_token_that_sees_only_itself_returns_its_value() -> None:
    one = torch.zeros(1, dtype=torch.int32)
    q, k, v = qkv(1)
    output = DenseAttention(Layout(one, one, one, one, one))(1, q, k, v, 0.3)
    assert torch.allclose(output[0, 0].view(4, 8), v[0, 0].repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    "groups, padding",
    [
        ([(5, [6])], 0),
        ([(5, [6])], 9),
        ([(3, [2, 7]), (8, [4]), (6, [3, 3, 5])], 0),
        ([(3, [2, 7]), (8, [4]), (6, [3, 3, 5])], 13),
        ([(1, [1])], 3),
        ([(3, [2]), (9, [70, 90]), (5, [4]), (2, [60]), (4, [1, 1])], 6),  # of very different lengths
    ],
)
def test_is_attention_under_the_mask_of_the_whole_row(groups: list, padding: int) -> None:
    row = row_of(groups, padding)
    q, k, v = qkv(len(row.tokens))
    output = DenseAttention(row.layout)(1, q, k, v, 0.25)
    expected = ExplicitAttention(torch.from_numpy(visibility(row.layout)))(1, q, k, v, 0.25)
    real = row.layout.group >= 0
    assert output.shape == expected.shape
    torch.testing.assert_close(output[real], expected[real], rtol=1e-12, atol=1e-12)
    assert (output[~real] == 0).all()


@pytest.mark.parametrize("groups", [[(5, [6, 3]), (4, [2])], [(4, [2]), (5, [90]), (6, [3])]])
def test_gradients_and_that_padding_has_none(groups: list) -> None:
    row = row_of(groups, 7)
    real = row.layout.group >= 0
    weight = torch.randn(len(row.tokens), 1, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = []
    for attention in (DenseAttention(row.layout), ExplicitAttention(torch.from_numpy(visibility(row.layout)))):
        inputs = qkv(len(row.tokens))
        (weight * attention(1, *inputs, 0.25))[real].sum().backward()
        grads.append([x.grad for x in inputs])
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        assert (found[~real] == 0).all()


def test_the_masks_of_a_row_are_about_as_large_as_the_squares_of_its_groups() -> None:
    short = [(8, [3])] * 40
    row = row_of([*short[:20], (8, [160]), *short[20:]], 5)
    lengths = torch.unique_consecutive(row.layout.group[row.layout.group >= 0], return_counts=True)[1]
    masks = DenseAttention(row.layout).masks
    assert [len(mask) for mask in masks] == [1, 40] and lengths.max() > 10 * lengths.min()
    assert sum(mask.numel() for mask in masks) < 1.3**2 * lengths.square().sum()
    assert len(DenseAttention(row_of(short, 5).layout).masks) == 1


def test_a_row_of_padding_only() -> None:
    row = build_row([], 16, MASK_ID, PAD_ID)
    q, k, v = qkv(16)
    output = DenseAttention(row.layout)(1, q, k, v, 0.25)
    assert output.shape == (16, 1, 32) and (output == 0).all()
    output.sum().backward()  # the graph of a pipeline stage must not break off here
    assert (q.grad == 0).all()


def test_rotary_angles_are_those_of_the_positions() -> None:
    position = torch.tensor([0, 5, 2, 5, 7], dtype=torch.int32)
    angles = RotaryByPosition(8, 100.0)(position)
    assert angles.shape == (5, 1, 1, 8)
    for token, place in enumerate(position.tolist()):
        wanted = [place * 100.0 ** (-2 * pair / 8) for pair in range(4)]
        assert angles[token, 0, 0].tolist() == pytest.approx(wanted + wanted, rel=1e-6)
