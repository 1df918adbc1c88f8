from __future__ import annotations

import pytest

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.model.presets import PRESETS
from megatron_dlm.model.shape import model_shape, resolve, transformer_config
from tests.tiny import model_config

platform.install()


def config(**overrides: object):
    return transformer_config(model_config(transformer_overrides=overrides), ParallelConfig())


def refused(**overrides: object) -> str:
    with pytest.raises(ConfigError) as error:
        config(**overrides)
    return str(error.value)


def test_sizes_arrive() -> None:
    found = config()
    assert (found.num_layers, found.hidden_size, found.num_query_groups, found.kv_channels) == (2, 32, 2, 8)
    assert (found.hidden_dropout, found.attention_dropout, found.normalization) == (0.0, 0.0, "RMSNorm")


@pytest.mark.parametrize(
    "name, value", [("hidden_dropout", 0.1), ("softmax_scale", 0.5), ("recompute_granularity", "selective")]
)
def test_an_override_arrives(name: str, value: object) -> None:
    assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention_dropout", 0.1),
        ("normalization", "LayerNorm"),
        ("multi_latent_attention", True),
        ("context_parallel_size", 2),
        ("cp_comm_type", "p2p"),
        ("window_size", [128, 0]),
        ("rotary_interleaved", True),
        ("virtual_pipeline_model_parallel_size", 2),
        ("fp8", "hybrid"),
        ("mtp_num_layers", 1),
    ],
)
def test_an_override_that_the_layers_do_not_follow_is_refused(name: str, value: object) -> None:
    assert refused(**{name: value}) == (
        f"--transformer-override {name}={value}: the layers of this model do not follow that field. Leave it out."
    )


@pytest.mark.parametrize("name, value", [("attention_dropout", 0.0), ("normalization", "RMSNorm"), ("fp8", None)])
def test_an_override_by_the_value_that_holds_anyway_is_none(name: str, value: object) -> None:
    assert getattr(config(**{name: value}), name) == value


def test_an_unknown_field_is_refused() -> None:
    assert "hidden_dropuot: megatron-core's TransformerConfig has no such field" in refused(hidden_dropuot=0.1)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(recompute_granularity="everything"),
        dict(activation_func_clamp_value="high", bias_activation_fusion=True, recompute_granularity="none"),
    ],
)
def test_what_megatron_core_refuses_is_told_in_one_sentence(overrides: dict[str, object]) -> None:
    message = refused(**overrides)
    assert message.startswith("megatron-core refuses this model (") and "\n" not in message
    assert all(f"{name}={value}" in message for name, value in overrides.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_is_not_given(preset: str) -> None:
    model = resolve(ModelConfig(model_preset=preset, num_layers=3), 100)
    assert model.num_layers == 3 and model.hidden_size == PRESETS[preset]["hidden_size"]
    assert model_shape(model).padded_vocab_size % 128 == 0


@pytest.mark.parametrize(
    "model, tokens, expected",
    [
        (ModelConfig(model_preset="huge"), 100, "--model-preset huge is not known"),
        (ModelConfig(num_layers=2), 100, "--hidden-size is not set"),
        (ModelConfig(model_preset="tiny", vocab_size=99), 100, "--vocab-size 99 is smaller than the tokenizer's 100"),
    ],
)
def test_a_size_that_is_missing_or_wrong_is_refused(model: ModelConfig, tokens: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve(model, tokens)
