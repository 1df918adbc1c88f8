"""Which fields of TransformerConfig pass, and which are refused."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.overrides import _REFUSED, _hints, check_overrides, of_the_function


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"add_bias_linear": True},
        {"softmax_scale": 1},  # a whole number is a number
        {"softmax_scale": None},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_modules": ["mlp"]},
        {"moe_layer_freq": 2},
        {"moe_layer_freq": [1, 0]},
        {"moe_router_load_balancing_type": "aux_loss"},
    ],
)
def test_what_passes(overrides):
    check_overrides(ModelConfig(transformer_overrides=overrides))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_layers", 3, ["Use --num-layers."]),
        ("num_moe_experts", 3, ["Use --num-experts."]),
        ("add_qkv_bias", True, ["Use --add-qkv-bias."]),
        ("moe_router_bias_update_rate", 0.1, ["decides on it"]),
        ("moe_shared_expert_overlpa", True, ["no such field", "Did you mean moe_shared_expert_overlap?"]),
        ("moe_shared_expert_overlap", "yes", ["needs true or false, not 'yes'"]),
        ("moe_shared_expert_overlap", 1, ["needs true or false, not 1"]),
        ("softmax_scale", "high", ["needs a number or null, not 'high'"]),
        ("softmax_scale", True, ["needs a number or null, not True"]),
        ("recompute_granularity", "ful", ["needs full, selective or null, not 'ful'"]),
        ("recompute_num_layers", 1.5, ["needs a whole number or null, not 1.5"]),
        ("recompute_modules", [1], ["needs a list or null, not [1]"]),
        ("activation_func", "gelu", ["cannot be given as text"]),
        ("attention_dropout", 0.1, ["dropout"]),
        ("normalization", "LayerNorm", ["norm of their own"]),
        ("window_size", [4, 4], ["attention of their own"]),
        ("context_parallel_size", 2, ["contradict a flag", "--context-parallel-size"]),
        ("cp_comm_type", "p2p", ["context parallelism of their own"]),
        ("virtual_pipeline_model_parallel_size", 2, ["--num-virtual-stages-per-pipeline-rank"]),
        ("multi_latent_attention", True, ["attention of their own"]),
        ("fp8_recipe", "delayed", ["would contradict a flag", "--fp8-recipe"]),
        ("fp8_dot_product_attention", True, ["layers and precision"]),
    ],
)
def test_what_is_refused(name, value, words):
    with pytest.raises(ConfigError) as caught:
        check_overrides(ModelConfig(transformer_overrides={name: value}))
    message = str(caught.value)
    assert f"--transformer-override {name}" in message and all(word in message for word in words), message
    assert "\n" not in message and message.endswith((".", "?"))


def test_every_refused_name_is_one_of_megatron_core():
    known = _hints()
    for patterns in _REFUSED.values():
        for pattern in patterns:
            assert any(name.startswith(pattern.rstrip("*")) for name in known), pattern


def test_what_changes_the_function():
    overrides = {"recompute_granularity": "full", "softmax_scale": 1.0, "moe_aux_loss_coeff": 0.1}
    assert of_the_function(overrides) == {"softmax_scale": 1.0}
