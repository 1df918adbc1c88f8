"""Row spans: every row of a checkpoint has one place, and slices of a shard are slices of the whole."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_dlm.checkpoint.hf.families import FAMILIES
from megatron_dlm.checkpoint.hf.spans import (
    FusedHeads,
    Gated,
    Heads,
    Same,
    Span,
    Stored,
    Vocabulary,
    tensors_of,
    within,
)
from megatron_dlm.checkpoint.hf.stored import whole_model
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve

MODEL = resolve(
    ModelConfig(
        num_layers=2,
        hidden_size=12,
        ffn_hidden_size=10,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=130,
        block_size=4,
    ),
    None,
)


def assembled(spans: list[Span], sources: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
    out = torch.full((rows, 12), -1.0)
    for span in spans:
        out[span.start : span.start + span.count] = sources[span.name][span.source : span.source + span.count]
    return out


def rows_of(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 12))).float()


def test_heads_stand_by_group() -> None:
    """megatron-core's order, written with the formula that its converters use."""
    q, k, v = rows_of(24, 0), rows_of(8, 1), rows_of(8, 2)
    expected = torch.cat([q.view(2, 12, 12), k.view(2, 4, 12), v.view(2, 4, 12)], 1).reshape(-1, 12)
    stored = Stored("x", 1, None, (40, 12))
    spans = Heads("{layer}.q", "{layer}.k", "{layer}.v").spans(stored, MODEL)
    assert torch.equal(assembled(spans, {"1.q": q, "1.k": k, "1.v": v}, 40), expected)
    fused = FusedHeads("{layer}.qkv").spans(stored, MODEL)
    assert torch.equal(assembled(fused, {"1.qkv": torch.cat([q, k, v])}, 40), expected)


def test_gate_before_up_and_padding_without_a_source() -> None:
    gate, up = rows_of(10, 0), rows_of(10, 1)
    spans = Gated("{expert}.g", "{expert}.u").spans(Stored("x", 0, 3, (20, 12)), MODEL)
    assert torch.equal(assembled(spans, {"3.g": gate, "3.u": up}, 20), torch.cat([gate, up]))
    words = rows_of(130, 2)
    padded = assembled(Vocabulary("w").spans(Stored("x", None, None, (256, 12)), MODEL), {"w": words}, 256)
    assert torch.equal(padded[:130], words) and (padded[130:] == -1).all()
    assert Same("{layer}.n").spans(Stored("x", 7, None, (12,)), MODEL) == [Span("7.n", 0, 0, 12)]


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 20])
def test_a_shard_is_a_slice(parts: int) -> None:
    sources = {"q": rows_of(24, 0), "k": rows_of(8, 1), "v": rows_of(8, 2)}
    spans = Heads("q", "k", "v").spans(Stored("x", 0, None, (40, 12)), MODEL)
    whole, rows = assembled(spans, sources, 40), 40 // parts
    for part in range(parts):
        shard = assembled(within(spans, part * rows, rows), sources, rows)
        assert torch.equal(shard, whole[part * rows : (part + 1) * rows])


def models() -> list[tuple[str, ModelConfig]]:
    """A model for each family."""
    experts = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=6)
    sizes = dict(
        num_layers=3,
        hidden_size=12,
        ffn_hidden_size=10,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=130,
    )
    grown = dict(
        moe_first_k_dense=1,
        moe_shared_expert_intermediate_size=6,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
    )
    own = {
        "llada": dict(full_attention=True, qk_layernorm=False),
        "dream": dict(full_attention=True, qk_layernorm=False, add_qkv_bias=True),
        "llada2": experts | grown | dict(block_size=4),
        "sdar-moe": experts | dict(block_size=4),
        "qwen3-moe": experts | dict(block_size=1),
    }
    found = []
    for name in FAMILIES:
        for untied in (True, False):
            changes = sizes | own.get(name, dict(block_size=4)) | dict(untie_embeddings_and_output_weights=untied)
            found.append((name, resolve(ModelConfig(**changes), None)))
    return found


@pytest.mark.parametrize("name, model", models())
def test_every_row_has_one_place(name: str, model: ModelConfig) -> None:
    family, stored = FAMILIES[name], whole_model(model)
    tensors = tensors_of(family.table, stored, model)
    placed: Counter = Counter()
    filled: Counter = Counter()
    for tensor, (shape, pieces) in tensors.items():
        for piece in pieces:
            placed.update((tensor, row) for row in range(piece.source, piece.source + piece.count))
            filled.update((piece.stored, row) for row in range(piece.start, piece.start + piece.count))
            assert piece.stored.shape[1:] == shape[1:]
    assert set(placed.values()) == {1} and set(filled.values()) == {1}
    assert len(placed) == sum(shape[0] for shape, _ in tensors.values())
    padding = 256 - 130
    missing = sum(one.shape[0] for one in stored) - len(filled)
    assert missing == padding * (2 if model.untie_embeddings_and_output_weights else 1)
