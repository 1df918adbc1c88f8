"""Checkpoints of random weights: the package reads them as it reads published ones."""

from __future__ import annotations

import torch

from megatron_dlm.checkpoint.hf.fresh import write_fresh
from megatron_dlm.checkpoint.hf.source import HFSource
from megatron_dlm.checkpoint.hf.stored import whole_model
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.data.train_tokenizer import train_tokenizer
from megatron_dlm.model.shape import resolve
from tests.checkpoint.hf.folders import read

SIZES = dict(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=1)
EXPERTS = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=8)
LIKE_QWEN3 = dict(qk_layernorm=True, untie_embeddings_and_output_weights=True, max_position_embeddings=64)
LIKE_QWEN3 |= dict(norm_epsilon=1e-6, rotary_base=1e4, kv_channels=8, block_size=8)


def test_dense_and_with_experts(tmp_path) -> None:
    size = train_tokenizer(["1+2=3"], 270, tmp_path / "tokenizer")
    for family, more in (("sdar", {}), ("sdar-moe", EXPERTS)):
        model = ModelConfig(**SIZES, **LIKE_QWEN3, **more, init_method_std=0.5)
        write_fresh(tmp_path / family, model, tmp_path / "tokenizer", size)
        source = HFSource.open(tmp_path / family)
        assert source.family.name == family and source.fields["block_size"] == 8
        described = resolve(ModelConfig(**source.fields), None)
        source.check(whole_model(described), described)  # every tensor that the model needs, and no other
        assert (described.num_layers, described.num_experts) == (2, more.get("num_experts"))
        assert Tokenizer(tmp_path / family).encode("12") == Tokenizer(tmp_path / "tokenizer").encode("12")
        weights = read(tmp_path / family)
        assert all(torch.equal(value, torch.ones_like(value)) for name, value in weights.items() if "norm" in name)
        drawn = torch.cat([value.flatten() for name, value in weights.items() if "norm" not in name])
        assert abs(drawn.std().item() - 0.5) < 0.02 and abs(drawn.mean().item()) < 0.02


def test_a_seed_names_the_weights(tmp_path) -> None:
    size = train_tokenizer(["1+2=3"], 270, tmp_path / "tokenizer")
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        write_fresh(tmp_path / name, ModelConfig(**SIZES, **LIKE_QWEN3), tmp_path / "tokenizer", size, seed)
    one, again, two = (read(tmp_path / name) for name in ("one", "again", "two"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], two["lm_head.weight"])
