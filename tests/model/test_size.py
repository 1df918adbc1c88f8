"""The number of parameters that is counted from a shape, against models that are built."""

from __future__ import annotations

import pytest

from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.presets import PRESETS
from megatron_dlm.model.shape import resolve
from megatron_dlm.model.size import model_size
from tests.tiny import make_model, model_config, one_process

EXPERTS = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24)
SHAPES = {
    "dense": {},
    "tied": dict(untie_embeddings_and_output_weights=False),
    "no norms of heads": dict(qk_layernorm=False),
    "biases": dict(add_qkv_bias=True),
    "wide heads": dict(kv_channels=24, num_query_groups=4),
    "padded vocabulary": dict(make_vocab_size_divisible_by=100),
    "experts": EXPERTS,
    "experts and plain layers": dict(
        EXPERTS, num_layers=3, moe_first_k_dense=1, moe_shared_expert_intermediate_size=16
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_is_that_of_the_model(name: str) -> None:
    built = sum(parameter.numel() for parameter in make_model(**SHAPES[name]).parameters())
    assert model_size(model_config(**SHAPES[name])).total == built


def test_is_that_of_the_value_model() -> None:
    groups = one_process()
    from megatron_dlm import platform
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.model.value import ValueModel

    config = model_config()
    with platform.cuda_calls_on_cpu():
        value = ValueModel(transformer_config(config, ParallelConfig()), model_shape(config), groups.pg_collection)
    assert model_size(config).value == sum(parameter.numel() for parameter in value.parameters())


@pytest.mark.parametrize(
    "preset, billions", [("sdar-1.7b", 2.03), ("sdar-4b", 4.41), ("sdar-8b", 8.19), ("sdar-30b-a3b", 30.5)]
)
def test_published_sizes(preset: str, billions: float) -> None:
    size = model_size(resolve(ModelConfig(model_preset=preset), None))
    assert size.total == pytest.approx(billions * 1e9, rel=2e-3)


def test_a_token_passes_some_experts() -> None:
    size = model_size(resolve(ModelConfig(model_preset="sdar-30b-a3b"), None))
    assert size.active == pytest.approx(3.3e9, rel=0.02)
    assert all(
        model_size(resolve(ModelConfig(model_preset=name), 1000 if name == "tiny" else None)).idle == 0
        for name, fields in PRESETS.items()
        if "num_experts" not in fields
    )
