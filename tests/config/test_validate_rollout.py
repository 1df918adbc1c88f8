"""Layouts that the engine can have, and those that are refused."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.config.validate_rollout import check_rollout_layout
from tests.config.test_validate import DENSE, GROUPS, MOE

TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
TP, EP = "rollout_tensor_model_parallel_size", "rollout_expert_model_parallel_size"
FLAG_TP, FLAG_EP = "--rollout-tensor-model-parallel-size", "--rollout-expert-model-parallel-size"


def told(model: dict, parallel: dict, *rest) -> str | None:
    try:
        check_rollout_layout(ParallelConfig(**parallel), ModelConfig(**model), *rest)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("model", "parallel", "words"),
    [
        (DENSE, {}, None),
        (DENSE, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), None),
        (
            DENSE,
            dict(tensor_model_parallel_size=4),
            ["--tensor-model-parallel-size 4", "2 query groups", "generation", "Use 1 or 2."],
        ),
        (dict(DENSE, num_query_groups=8), dict(tensor_model_parallel_size=4), None),
        (MOE, TP2_SP, None),
        (GROUPS, TP2_SP, None),
        (dict(DENSE, full_attention=True, block_size=None), {}, None),
        (dict(DENSE, logit_shift=1), {}, None),
        (MOE, dict(expert_model_parallel_size=2), None),
        (MOE, dict(expert_model_parallel_size=4, expert_tensor_parallel_size=1, **TP2_SP), None),
        (
            dict(MOE, num_experts=6),
            dict(expert_model_parallel_size=3, expert_tensor_parallel_size=1, **TP2_SP),
            [
                "--tensor-model-parallel-size 2",
                "3 x 1",
                "in two groups",
                "Make one of 2 and 3 a multiple of the other.",
            ],
        ),
        (
            dict(MOE, moe_ffn_hidden_size=33),
            dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1, **TP2_SP),
            None,  # whole experts of an odd width
        ),
    ],
)
def test_an_engine_in_the_layout_of_training(model, parallel, words) -> None:
    message = told(model, parallel)
    assert (message is None) if words is None else all(word in message for word in words), message


@pytest.mark.parametrize(
    ("model", "parallel", "engine", "world", "words"),
    [
        (DENSE, dict(tensor_model_parallel_size=2), {}, 2, None),
        (DENSE, dict(tensor_model_parallel_size=2), {TP: 1}, 2, None),
        (DENSE, {}, {TP: 2}, 2, None),
        (DENSE, dict(tensor_model_parallel_size=4), {TP: 2}, 4, None),  # training splits query groups, the engine not
        (DENSE, dict(tensor_model_parallel_size=4), {}, 4, ["2 query groups", f"1 or 2, or give that as {FLAG_TP}"]),
        (DENSE, dict(tensor_model_parallel_size=4), {TP: 4}, 4, [f"{FLAG_TP} 4", "2 query groups", "Use 1 or 2."]),
        (DENSE, {}, {TP: 2}, 1, [f"{FLAG_TP} 2", "1 processes", "Use 1."]),
        (DENSE, {}, {TP: 4}, 6, [f"{FLAG_TP} 4", "6 processes", "Use 1, 2, 3 or 6."]),
        (DENSE, {}, {TP: 3}, 3, [f"{FLAG_TP} 3", "8 attention heads"]),
        (dict(DENSE, ffn_hidden_size=97), {}, {TP: 2}, 2, [f"{FLAG_TP} 2", "--ffn-hidden-size 97"]),
        (dict(DENSE, make_vocab_size_divisible_by=1, vocab_size=1001), {}, {TP: 2}, 2, [f"{FLAG_TP} 2", "vocabulary"]),
        (DENSE, {}, {TP: 0}, 2, [f"{FLAG_TP} is 0"]),
        (DENSE, {}, {EP: 0}, 2, [f"{FLAG_EP} is 0"]),
        (DENSE, {}, {"refit_bucket_mib": 0}, 2, ["--refit-bucket-mib is 0"]),
        (DENSE, {}, {EP: 2}, 2, [f"{FLAG_EP} 2", "needs a model with experts"]),
        (MOE, dict(expert_model_parallel_size=2), {EP: 1}, 2, None),
        (MOE, dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1, **TP2_SP), {TP: 1, EP: 1}, 2, None),
        (MOE, dict(expert_model_parallel_size=2), {}, 2, None),
        (MOE, {}, {EP: 2}, 2, None),
        (MOE, dict(expert_model_parallel_size=2), {EP: 4, TP: 2}, 4, None),
        (MOE, {}, {EP: 3}, 3, [f"{FLAG_EP} 3", "8 experts", "Use 1, 2, 4 or 8."]),
        (MOE, {}, {EP: 4}, 2, ["2 processes", f"{FLAG_EP} 4", "multiple of 4", f"{FLAG_EP} 1"]),
        (MOE, TP2_SP | dict(expert_model_parallel_size=2), {}, 4, None),
        (dict(MOE, num_experts=6), {}, {EP: 3, TP: 2}, 6, [f"{FLAG_TP} 2", "3 x 1", f"or use {FLAG_EP} 1."]),
        (MOE, dict(expert_model_parallel_size=2), {"rollout_backend": "sglang"}, 2, None),
        (dict(MOE, moe_ffn_hidden_size=33), {}, {TP: 2}, 2, ["width 33", "2 tensor-parallel", FLAG_TP]),
    ],
)  # fmt: skip
def test_an_engine_in_a_layout_of_its_own(model, parallel, engine, world, words) -> None:
    message = told(model, parallel, EngineConfig(**engine), world)
    assert (message is None) if words is None else all(word in message for word in words), message
