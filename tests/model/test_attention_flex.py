"""FlexAttention over packed rows against the dense attention, which test_attention.py holds against explicit masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import Grid, Layout
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.model import attention_backends, attention_flex
from megatron_dlm.model.attention import DenseAttention
from megatron_dlm.model.attention_backends import attention_of, check_attention, served
from megatron_dlm.model.attention_flex import FlexAttention, attend, block_mask, written_out
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item, visibility
from tests.model.test_attention import qkv, row_of
from tests.tiny import furthest, gradients, make_model

CPU = torch.device("cpu")
SHAPES = [
    ([(5, [6])], 0),
    ([(3, [2, 7]), (8, [4]), (6, [3, 3, 5])], 13),
    ([(3, [2]), (9, [70, 90]), (5, [4]), (2, [60]), (4, [1, 1])], 6),
    ([], 16),
]


@pytest.mark.parametrize("groups, padding", SHAPES)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)])
def test_output_and_gradients_are_those_of_dense_attention(groups: list, padding: int, heads: tuple[int, int]) -> None:
    row = row_of(groups, padding)
    weight = torch.randn(len(row.tokens), 1, heads[0] * 8, dtype=torch.float64)
    found = []
    for kind in (FlexAttention, DenseAttention):
        inputs = qkv(len(row.tokens), *heads)
        out = kind(row.layout)(1, *inputs, 0.3)
        (weight * out).sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    for mine, dense in zip(*found, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-11, atol=1e-12)
        assert (mine[row.layout.group < 0] == 0).all()


def test_the_mask_of_tables_and_rule_is_the_visibility_rule() -> None:
    layout = row_of([(3, [2, 70]), (80, [90, 3])], 9).layout
    made = FlexAttention(layout)
    mask = written_out(made.tables, *made.columns)
    expected = visibility(layout)
    np.fill_diagonal(expected, expected.diagonal() & (layout.group >= 0).numpy())
    length = len(layout.group)
    assert np.array_equal(mask[:length, :length].numpy(), expected)
    assert not mask[length:].any() and not mask[:, length:].any()


def test_a_backward_pass_that_reads_nothing_but_the_tables(monkeypatch) -> None:
    """Tile by tile as a kernel goes: queries by the tables of keys, keys and values by the tables of queries."""
    tile = 16
    monkeypatch.setattr(attention_flex, "TILE", tile)
    row = row_of([(3, [2, 40]), (20, [30, 3])], 5)
    q, k, v = qkv(len(row.tokens), 1, 1)
    gradient = torch.randn_like(q)
    made = FlexAttention(row.layout)
    (made(1, q, k, v, 0.3) * gradient.flatten(2)).sum().backward()
    mask = block_mask(made.arguments[:8], *made.columns)

    length = made.columns[0].shape[1]
    Q, K, V, G = (torch.nn.functional.pad(x.detach()[:, 0, 0], (0, 0, 0, length - len(x))) for x in (q, k, v, gradient))
    scores = lambda i, j: 0.3 * Q[at(i)] @ K[at(j)].T
    at = lambda n: slice(n * tile, (n + 1) * tile)

    def tiles(partial: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor], line: int):
        for (count, which), is_full in ((partial, False), (full, True)):
            for other in which[0, 0, line, : count[0, 0, line]].tolist():
                yield other, is_full

    def allowed(i: int, j: int, is_full: bool) -> Tensor:
        if is_full:
            return torch.ones(tile, tile, dtype=torch.bool)
        query, key = torch.arange(i * tile, (i + 1) * tile), torch.arange(j * tile, (j + 1) * tile)
        return mask.mask_mod(torch.tensor(0), torch.tensor(0), query[:, None], key)

    of_queries = (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)
    of_keys = (mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices)
    total, out, dq, dk, dv = torch.zeros(length).double(), *(torch.zeros_like(Q) for _ in range(4))
    count = length // tile
    for i in range(count):
        for j, is_full in tiles(*of_queries, i):
            share = scores(i, j).exp() * allowed(i, j, is_full)
            total[at(i)] += share.sum(1)
            out[at(i)] += share @ V[at(j)]
    total[total == 0] = 1
    inner = (out / total[:, None] * G).sum(1)

    def slope(i: int, j: int, is_full: bool) -> tuple[Tensor, Tensor]:
        share = scores(i, j).exp() * allowed(i, j, is_full) / total[at(i), None]
        return share, 0.3 * share * (G[at(i)] @ V[at(j)].T - inner[at(i), None])

    for i in range(count):
        for j, is_full in tiles(*of_queries, i):
            dq[at(i)] += slope(i, j, is_full)[1] @ K[at(j)]
    fulls = 0
    for j in range(count):
        for i, is_full in tiles(*of_keys, j):
            share, by_score = slope(i, j, is_full)
            dv[at(j)] += share.T @ G[at(i)]
            dk[at(j)] += by_score.T @ Q[at(i)]
            fulls += is_full
    assert fulls > 0
    for mine, theirs in zip((dq, dk, dv), (q, k, v)):
        torch.testing.assert_close(mine[: len(row.tokens)], theirs.grad[:, 0, 0], rtol=1e-11, atol=1e-12)


def test_torch_compiles_it_once_for_all_layouts_and_lengths(monkeypatch) -> None:
    """Traced with its backward pass as for a GPU, and computed by torch's reference, which takes gradients on a CPU if
    nobody asks."""
    import torch.nn.attention.flex_attention as torch_flex
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setitem(attention_flex._OPTIONS, "cpu", attention_flex._OPTIONS["cuda"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    monkeypatch.setattr(attention_flex, "compiled", lambda: compiled)
    shapes = ([(5, [20, 30])], 3), ([(60, [70]), (3, [2, 7])], 0), ([], 16), ([(5, [30]), (9, [60])], 90)
    for number, (groups, padding) in enumerate(shapes):
        row = row_of(groups, padding, number)
        made, found = FlexAttention(row.layout), []
        for way in (FlexAttention._on_gpu, FlexAttention._on_cpu):
            inputs = qkv(len(row.tokens))
            with monkeypatch.context() as patch:
                patch.setattr(FlexAttention, "_on_cpu", way)
                out = made(1, *inputs, 0.3)
            (out * torch.linspace(-1, 1, 32)).sum().backward()
            found.append([out, *(x.grad for x in inputs)])
        for mine, expected in zip(*found, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)
    assert counter.frame_count == 1


def test_models_of_many_shapes_share_a_process(monkeypatch) -> None:
    """More than torch compiles one function for unless it is told to."""
    import torch.nn.attention.flex_attention as torch_flex
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *words, **more: compile_(*words, backend=counter, **more))
    row = row_of([(5, [20])], 3)
    made = FlexAttention(row.layout)
    with torch._dynamo.config.patch(recompile_limit=2):
        once = attention_flex.compiled.__wrapped__()
        monkeypatch.setattr(attention_flex, "compiled", lambda: once)
        for width in (16, 24, 32, 40):
            q, k, v = (torch.randn(len(row.tokens), 1, heads, width) for heads in (4, 2, 2))
            expected = made(1, q, k, v, width**-0.5)
            with monkeypatch.context() as patch:
                patch.setattr(FlexAttention, "_on_cpu", FlexAttention._on_gpu)
                torch.testing.assert_close(made(1, q, k, v, width**-0.5), expected)
    assert counter.frame_count >= 3


# In a model ---------------------------------------------------------------------------------------------------------


def test_a_model_has_the_same_logits_and_gradients() -> None:
    rng = np.random.default_rng(0)
    traces = [trace for n in (5, 9) for trace in random_group(n, [14, 3], 4, rng, f"p{n}")]
    row = build_row(list(enumerate(trace_item(trace, Grid(4)) for trace in traces)), 320, MASK_ID, PAD_ID)
    found = []
    for backend in ("flex", "dense"):
        model = make_model()
        model.attention_backend = backend
        logits = model.forward_row(row)
        found.append((logits, gradients(model, logits.logsumexp(-1).square().sum())))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-11, atol=1e-11)
    assert furthest(found[0][1], found[1][1]) < 1e-11


def test_the_flag_reaches_the_models_of_a_session_and_an_update_is_the_same() -> None:
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.sft.objective import sft_forward
    from megatron_dlm.training.setup import Session
    from megatron_dlm.training.step import train_step
    from tests.tiny import Words, disturb, model_config, one_process, vocabulary

    row, results = row_of([(5, [6, 9]), (7, [20])], 12), []
    for backend in ("flex", "dense"):
        parallel = ParallelConfig(attention_backend=backend)
        session = Session(model_config(), parallel, Words(), one_process(), vocabulary())
        state = session.train_state(OptimizerConfig(lr=1e-2, adam_eps=1e-3), 2)
        value = session.value_state(None, 1)
        assert {chunk.module.attention_backend for chunk in (*state.chunks, *value.chunks)} == {backend}
        assert f", {backend} attention; " in session.describe(state)
        for chunk in state.chunks:
            disturb(chunk.module, 0)
        results.append(train_step(state, [row, row], sft_forward(vocabulary(), 2, 512), len(row.tokens)))
    assert results[0].metrics["loss"] == pytest.approx(results[1].metrics["loss"], rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)


def test_rows_of_whole_tiles_are_not_filled_up() -> None:
    from types import SimpleNamespace

    from megatron_dlm.training.setup import Session

    model = ModelConfig(bf16=True, kv_channels=16)
    session = Session(model, ParallelConfig(attention_backend="flex"), None, SimpleNamespace(tp_size=3), None)
    length = session.row_multiple
    assert length == 384, "whole tiles, and as much for each of 3 ranks"
    assert dataclasses.replace(session, attention="dense").row_multiple == 192, "where the kernels do not work"
    assert Session(model, ParallelConfig(), None, SimpleNamespace(tp_size=1), None).row_multiple == 64, "on a CPU"
    x = torch.zeros(length, 1, 2, 16)
    layout = row_of([(9, [7])], 0).layout.padded(length)
    whole = attention_flex._by_head(x, len(attention_flex._whole_tiles(layout).group))
    assert whole.data_ptr() == x.data_ptr() and whole.shape == (1, 2, length, 16)


@pytest.mark.parametrize("backend", ["dense", "flex"])
def test_virtual_stages_share_the_attention_of_a_row_and_the_last_one_lets_go(backend: str) -> None:
    row = row_of([(5, [6])], 0)
    first = attention_of(row, None, backend, more_to_come=True)
    assert attention_of(row, None, backend, more_to_come=True) is first
    assert attention_of(row, None, backend) is first and not row.made
    assert attention_of(row, None, backend) is not first and not row.made


# Which one ----------------------------------------------------------------------------------------------------------


class Gpu:
    """A device that says it is a GPU; nothing is computed on it."""

    type = "cuda"


@pytest.fixture
def triton(monkeypatch) -> None:
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: name)


def test_auto_is_flex_on_a_gpu_where_it_serves_and_dense_elsewhere(triton) -> None:
    assert served("auto", torch.bfloat16, 128, CPU) == "dense"
    assert served("auto", torch.bfloat16, 128, Gpu()) == "flex"
    assert served("auto", torch.float64, 128, Gpu()) == "dense"
    assert served("auto", torch.bfloat16, 8, Gpu()) == "dense"
    assert served("dense", torch.bfloat16, 128, Gpu()) == "dense"
    assert served("flex", torch.float64, 8, CPU) == "flex"


def test_what_flex_cannot_do_is_refused(triton, monkeypatch) -> None:
    monkeypatch.setattr(attention_backends.platform, "device", Gpu)
    model = ModelConfig(kv_channels=64, fp64=True)
    assert check_attention(ParallelConfig(), model) == "dense"
    with pytest.raises(ConfigError, match="does not compute in float64 on a GPU. Leave out --fp64"):
        check_attention(ParallelConfig(attention_backend="flex"), model)
    with pytest.raises(ConfigError, match="no kernels for heads of 8; they must be 16 wide"):
        check_attention(ParallelConfig(attention_backend="flex"), ModelConfig(kv_channels=8))
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="needs Triton, which is not installed"):
        check_attention(ParallelConfig(attention_backend="flex"), ModelConfig(kv_channels=64))
    assert served("auto", torch.bfloat16, 64, Gpu()) == "dense"


def test_layouts_of_another_length_than_the_keys() -> None:
    """As under context parallelism: some queries of a row, to all of its keys."""
    layout = row_of([(5, [40, 30]), (3, [50])], 7).layout
    asks = torch.arange(0, len(layout.group), 3)
    some = Layout(layout.group[asks], layout.response[asks], layout.view[asks], layout.block[asks], asks.int())
    q, k, v = qkv(len(layout.group))
    found, expected = (kind(some, layout)(1, q[asks], k, v, 0.3) for kind in (FlexAttention, DenseAttention))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
