"""Layers of Transformer Engine and FP8 that can be, and what is refused."""

from __future__ import annotations

import pytest

from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig, with_local_layers
from megatron_dlm.config.validate_fp8 import check_fp8, check_fp8_optimizer, check_fp8_weights, check_lora_layers
from tests.config.test_validate import DENSE, MOE

TE = dict(transformer_impl="transformer_engine")
FP8 = dict(**TE, fp8_format="hybrid")
GATHER = FP8 | dict(fp8_param_gather=True, use_distributed_optimizer=True)
ENDS = FP8 | dict(first_last_layers_bf16=True)
BF16 = dict(DENSE, bf16=True)
EXPERTS = dict(MOE, bf16=True)


def told(check, *given) -> str | None:
    try:
        check(*given)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("parallel", "model"),
    [
        ({}, DENSE),
        (TE, DENSE),
        (TE, BF16),
        (FP8, BF16),
        (FP8, EXPERTS),
        (FP8 | dict(fp8_format="e4m3", fp8_recipe="mxfp8"), BF16),
        (FP8 | dict(fp8_recipe="delayed", fp8_amax_history_len=16, fp8_amax_compute_algo="max", fp8_margin=1), BF16),
        (ENDS | dict(num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=4), BF16),
        (ENDS | dict(fp8_recipe="blockwise", pipeline_model_parallel_size=2), BF16),
        (GATHER, BF16),
    ],
)
def test_what_goes_together(parallel: dict, model: dict) -> None:
    assert told(check_fp8, ParallelConfig(**parallel), ModelConfig(**model)) is None


@pytest.mark.parametrize(
    ("parallel", "model", "words"),
    [
        (TE, dict(DENSE, fp64=True), ["--fp64"]),
        (dict(fp8_recipe="delayed"), BF16, ["--fp8-recipe delayed", "--fp8-format"]),
        (dict(fp8_param_gather=True), BF16, ["--fp8-param-gather does nothing"]),
        (dict(fp8_format="e4m3"), BF16, ["--fp8-format e4m3", "transformer_engine"]),
        (FP8, DENSE, ["--bf16"]),
        (FP8 | dict(fp8_margin=1), BF16, ["--fp8-margin 1", "tensorwise"]),
        (FP8 | dict(fp8_recipe="delayed", fp8_margin=-1), BF16, ["--fp8-margin -1"]),
        (FP8 | dict(fp8_recipe="delayed", fp8_amax_history_len=0), BF16, ["--fp8-amax-history-len 0"]),
        (FP8 | dict(num_layers_at_end_in_bf16=2), BF16, ["--num-layers-at-end-in-bf16 2", "first-last"]),
        (ENDS | dict(fp8_recipe="delayed"), BF16, ["delayed"]),
        (ENDS | dict(num_layers_at_end_in_bf16=5), BF16, ["5", "4 layers"]),
        (ENDS | dict(pipeline_model_parallel_size=2, num_layers_at_start_in_bf16=3), BF16, ["3", "2 layers"]),
        (GATHER | dict(use_distributed_optimizer=False), BF16, ["--use-distributed-optimizer"]),
        (GATHER | dict(fp8_recipe="mxfp8"), BF16, ["mxfp8"]),
        (FP8 | dict(fp8_recipe="delayed", recompute_modules=["layernorm"]), BF16, ["layernorm"]),
        (FP8, dict(BF16, ffn_hidden_size=72), ["--ffn-hidden-size is 72", "multiples of 16"]),
        (FP8, dict(EXPERTS, moe_ffn_hidden_size=40), ["--moe-ffn-hidden-size is 40"]),
        (FP8 | dict(tensor_model_parallel_size=2), dict(BF16, ffn_hidden_size=48), ["over 2 processes"]),
        (FP8, dict(BF16, hidden_size=72), ["--hidden-size is 72"]),
        (FP8, dict(BF16, num_attention_heads=7, num_query_groups=7), ["attention heads is 56"]),
        (FP8, dict(EXPERTS, moe_shared_expert_intermediate_size=24), ["shared-expert-intermediate-size is 24"]),
        (FP8 | dict(fp8_recipe="mxfp8"), dict(BF16, ffn_hidden_size=80), ["multiples of 32"]),
    ],
)
def test_what_is_refused(parallel: dict, model: dict, words: list[str]) -> None:
    message = told(check_fp8, ParallelConfig(**parallel), ModelConfig(**model))
    assert message is not None and all(word in message for word in words), message


def test_what_only_some_weights_can_do() -> None:
    gather, fused = ParallelConfig(**GATHER), ParallelConfig(**TE)
    assert "convert" in told(check_fp8_weights, gather, LoadConfig(hf_checkpoint="there"))
    assert told(check_fp8_weights, gather, LoadConfig(load="there")) is None
    assert told(check_fp8_weights, fused, LoadConfig(hf_checkpoint="there")) is None
    assert "offload" in told(check_fp8_optimizer, gather, OptimizerConfig(optimizer_cpu_offload=True))
    assert told(check_fp8_optimizer, fused, OptimizerConfig(optimizer_cpu_offload=True)) is None
    assert "--fp8-param-gather" in told(check_lora_layers, LoraConfig(lora_rank=4), gather)
    assert told(check_lora_layers, LoraConfig(lora_rank=4), fused) is None
    assert told(check_lora_layers, LoraConfig(), gather) is None


def test_engines_have_plain_layers_in_the_same_layout() -> None:
    layout = dict(tensor_model_parallel_size=2, use_distributed_optimizer=True, recompute_granularity="full")
    fused = ParallelConfig(**FP8 | dict(fp8_recipe="delayed", fp8_margin=3, first_last_layers_bf16=True) | layout)
    assert with_local_layers(fused) == ParallelConfig(**layout)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 1),
        (TE, 1),
        (FP8, 16),
        (FP8 | dict(fp8_recipe="delayed"), 16),
        (FP8 | dict(fp8_recipe="blockwise"), 128),
        (FP8 | dict(fp8_recipe="mxfp8"), 32),
    ],
)
def test_rows_are_as_long_as_fp8_wants_them_on_each_rank(given: dict, tokens: int) -> None:
    from megatron_dlm.diffusion.planner import FLEX_TILE, ROW_MULTIPLE, row_multiple

    assert ParallelConfig(**given).token_multiple == tokens
    for ranks in (1, 2, 3, 8):
        multiple = row_multiple(ranks, tokens)
        assert multiple % ROW_MULTIPLE == 0 and multiple % ranks == 0 and multiple // ranks % tokens == 0
        assert multiple <= ROW_MULTIPLE * ranks * tokens
        tiled = row_multiple(ranks, tokens, "flex")
        assert tiled % FLEX_TILE == tiled % multiple == 0 and tiled <= 2 * multiple
