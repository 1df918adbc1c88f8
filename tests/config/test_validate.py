"""Every refusal of a shape or of a parallel split, and the combinations that must pass."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.validate import check_model, check_parallel

DENSE = dict(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    max_position_embeddings=512,
    vocab_size=1000,
    block_size=4,
)
MOE = dict(DENSE, num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=32)
GROUPS = dict(
    MOE,
    num_experts=16,
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
    moe_first_k_dense=1,
    moe_shared_expert_intermediate_size=48,
)
TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)


def refused(check, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))
    return str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        DENSE,
        MOE,
        dict(DENSE, moe_ffn_hidden_size=96),
        dict(DENSE, kv_channels=None),
        dict(DENSE, transformer_overrides={"add_bias_linear": True}),
        dict(DENSE, block_size=None, full_attention=True, add_qkv_bias=True, logit_shift=1, rotary_percent=0.5),
        GROUPS,
        dict(MOE, transformer_overrides={"moe_layer_freq": [0, 1, 0, 1]}),
    ],
)
def test_a_possible_model_passes(values):
    check_model(ModelConfig(**values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(num_layers=None), ["no --num-layers", "--model-preset"]),
        (dict(hidden_size=None), ["no --hidden-size"]),
        (dict(num_attention_heads=None), ["no --num-attention-heads"]),
        (dict(num_layers=0), ["--num-layers is 0", "1 or more"]),
        (dict(block_size=0), ["--block-size is 0"]),
        (dict(vocab_size=-1), ["--vocab-size is -1"]),
        (dict(make_vocab_size_divisible_by=0), ["--make-vocab-size-divisible-by is 0"]),
        (dict(rotary_base=0.0), ["--rotary-base is 0.0", "above 0"]),
        (dict(norm_epsilon=-1e-6), ["--norm-epsilon is -1e-06"]),
        (dict(init_method_std=-0.1), ["--init-method-std is -0.1"]),
        (dict(num_query_groups=3), ["--num-query-groups 3", "8 attention heads", "Use 1, 2, 4 or 8."]),
        (dict(kv_channels=None, hidden_size=60), ["--num-attention-heads 8", "--hidden-size 60", "--kv-channels"]),
        (dict(moe_router_topk=2), ["--moe-router-topk 2", "--num-experts"]),
        (dict(moe_ffn_hidden_size=32), ["--moe-ffn-hidden-size 32", "--num-experts"]),
        (dict(num_experts=8), ["--num-experts 8", "--moe-router-topk"]),
        (dict(num_experts=8, moe_router_topk=9), ["--moe-router-topk 9", "8 experts", "at most 8"]),
        (dict(num_experts=8, moe_router_topk=0), ["--moe-router-topk is 0"]),
        (
            dict(GROUPS, num_experts=None, moe_router_topk=None),
            ["--moe-ffn-hidden-size 32 is for a model with experts"],
        ),
        (dict(moe_first_k_dense=0), ["--moe-first-k-dense 0 is for a model with experts"]),
        (dict(GROUPS, moe_first_k_dense=-1), ["--moe-first-k-dense is -1"]),
        (dict(GROUPS, moe_first_k_dense=4), ["--moe-first-k-dense 4", "none of the 4 layers", "at most 3"]),
        (dict(GROUPS, moe_shared_expert_intermediate_size=0), ["--moe-shared-expert-intermediate-size is 0"]),
        (dict(GROUPS, moe_router_score_function="softmax"), ["--moe-router-enable-expert-bias", "sigmoid only"]),
        (dict(GROUPS, moe_router_score_function=None), ["sigmoid only, not softmax"]),
        (dict(GROUPS, moe_router_group_topk=None), ["--moe-router-num-groups needs --moe-router-group-topk"]),
        (dict(GROUPS, moe_router_num_groups=None), ["--moe-router-group-topk needs --moe-router-num-groups"]),
        (dict(GROUPS, moe_router_num_groups=3), ["--moe-router-num-groups 3", "16 experts"]),
        (dict(GROUPS, moe_router_group_topk=5), ["--moe-router-group-topk 5", "4 groups", "at most 4"]),
        (dict(GROUPS, moe_router_num_groups=16), ["16 groups are 1 in each", "fewer groups"]),
        (dict(GROUPS, moe_router_group_topk=1), ["--moe-router-topk 4", "best 2", "--moe-router-topk 2."]),
        (dict(GROUPS, moe_router_group_topk=4), ["--moe-router-topk 4", "best 2", "--moe-router-topk 8."]),
        (dict(GROUPS, moe_router_topk_scaling_factor=0.0), ["--moe-router-topk-scaling-factor is 0.0", "above 0"]),
        (dict(GROUPS, transformer_overrides={"moe_layer_freq": 2}), ["moe_layer_freq", "--moe-first-k-dense"]),
        (dict(MOE, transformer_overrides={"moe_layer_freq": [0, 1]}), ["[0, 1]", "4 layers", "entry per layer"]),
        (dict(MOE, transformer_overrides={"moe_layer_freq": 0}), ["moe_layer_freq is 0"]),
        (dict(rotary_percent=0.0), ["--rotary-percent is 0.0"]),
        (dict(rotary_percent=1.5), ["--rotary-percent is 1.5"]),
        (dict(rotary_percent=0.4), ["--rotary-percent 0.4 of the 8 channels", "are 3", "even number"]),
        (dict(rotary_percent=0.1), ["are 0"]),
        (dict(logit_shift=2), ["--logit-shift is 2"]),
        (dict(full_attention=True), ["--block-size 4", "full attention", "--no-full-attention"]),
        (dict(transformer_overrides={"num_layers": 3}), ["num_layers", "Use --num-layers."]),
        (dict(transformer_overrides={"tensor_model_parallel_size": 2}), ["Use --tensor-model-parallel-size."]),
        (dict(transformer_overrides={"num_moe_experts": 2}), ["num_moe_experts", "Use --num-experts."]),
        (dict(transformer_overrides={"params_dtype": "bf16"}), ["params_dtype", "Use --bf16."]),
    ],
)
def test_an_impossible_model_is_refused(values, words):
    message = refused(check_model, ModelConfig(**{**DENSE, **values}))
    assert all(word in message for word in words), message


def test_the_sentence_of_the_style_guide():
    message = refused(check_parallel, ParallelConfig(tensor_model_parallel_size=3), ModelConfig(**DENSE), 3)
    assert message == (
        "--tensor-model-parallel-size 3 does not divide the 8 attention heads of this model. Use 1, 2, 4 or 8."
    )


@pytest.mark.parametrize(
    ("model", "values", "world_size"),
    [
        (DENSE, {}, 1),
        (DENSE, {}, 3),
        (DENSE, dict(tensor_model_parallel_size=2), 6),
        (DENSE, dict(tensor_model_parallel_size=8), 8),  # more processes than query groups
        (DENSE, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, sequence_parallel=True), 8),
        (DENSE, dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True), 2),
        (DENSE, dict(overlap_grad_reduce=True), 2),
        (DENSE, dict(context_parallel_size=3), 6),
        (DENSE, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2), 2),
        (MOE, dict(context_parallel_size=2, expert_model_parallel_size=4), 4),
        (MOE, dict(expert_model_parallel_size=4), 4),
        (MOE, TP2_SP, 2),
        (MOE, dict(TP2_SP, expert_tensor_parallel_size=2), 2),
        (MOE, dict(TP2_SP, expert_model_parallel_size=2, expert_tensor_parallel_size=1), 2),
    ],
)
def test_a_possible_split_passes(model, values, world_size):
    check_model(ModelConfig(**model))
    check_parallel(ParallelConfig(**values), ModelConfig(**model), world_size)


@pytest.mark.parametrize(
    ("model", "values", "world_size", "words"),
    [
        (DENSE, dict(tensor_model_parallel_size=0), 1, ["--tensor-model-parallel-size is 0"]),
        (DENSE, dict(pipeline_model_parallel_size=-1), 1, ["--pipeline-model-parallel-size is -1"]),
        (DENSE, dict(distributed_timeout_minutes=0), 1, ["--distributed-timeout-minutes is 0"]),
        (
            dict(DENSE, num_attention_heads=12, num_query_groups=4, ffn_hidden_size=96),
            dict(tensor_model_parallel_size=6),
            6,
            ["--tensor-model-parallel-size 6", "4 query groups", "Use 1, 2, 4 or 12."],
        ),
        (
            dict(DENSE, ffn_hidden_size=90),
            dict(tensor_model_parallel_size=4),
            4,
            ["--tensor-model-parallel-size 4", "--ffn-hidden-size 90", "Use 1 or 2."],
        ),
        (
            dict(DENSE, make_vocab_size_divisible_by=2, vocab_size=1002),
            dict(tensor_model_parallel_size=4),
            4,
            ["--tensor-model-parallel-size 4", "vocabulary", "--make-vocab-size-divisible-by 4"],
        ),
        (
            dict(DENSE, make_vocab_size_divisible_by=1, vocab_size=None),
            dict(tensor_model_parallel_size=2),
            2,
            ["vocabulary", "--make-vocab-size-divisible-by 2"],
        ),
        (DENSE, dict(sequence_parallel=True), 1, ["--sequence-parallel", "--tensor-model-parallel-size"]),
        (
            DENSE,
            dict(pipeline_model_parallel_size=3),
            3,
            ["--pipeline-model-parallel-size 3", "4 layers", "Use 1, 2 or 4."],
        ),
        (
            DENSE,
            dict(tensor_model_parallel_size=2),
            3,
            ["3 processes", "--tensor-model-parallel-size 2", "multiple of 2"],
        ),
        (
            DENSE,
            dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            6,
            ["6 processes", "multiple of 4"],
        ),
        (DENSE, dict(context_parallel_size=0), 1, ["--context-parallel-size is 0"]),
        (DENSE, dict(context_parallel_size=2), 3, ["3 processes", "--context-parallel-size 2", "multiple of 2"]),
        (
            dict(DENSE, full_attention=True, block_size=None),
            dict(context_parallel_size=2),
            2,
            ["--context-parallel-size 2", "full attention", "Use 1"],
        ),
        (
            DENSE,
            dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=1),
            2,
            ["--num-virtual-stages-per-pipeline-rank is 1"],
        ),
        (
            DENSE,
            dict(num_virtual_stages_per_pipeline_rank=2),
            1,
            ["--num-virtual-stages-per-pipeline-rank 2", "--pipeline-model-parallel-size 2 or more"],
        ),
        (
            DENSE,
            dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=3),
            2,
            ["--num-virtual-stages-per-pipeline-rank 3", "2 layers of a pipeline stage", "Use 1 or 2."],
        ),
        (
            DENSE,
            dict(overlap_param_gather=True, overlap_grad_reduce=True),
            2,
            ["--overlap-param-gather", "--use-distributed-optimizer"],
        ),
        (
            DENSE,
            dict(overlap_param_gather=True, use_distributed_optimizer=True),
            2,
            ["--overlap-param-gather", "--overlap-grad-reduce"],
        ),
        (
            DENSE,
            dict(expert_model_parallel_size=2),
            2,
            ["--expert-model-parallel-size 2", "needs a model with experts"],
        ),
        (
            DENSE,
            dict(expert_tensor_parallel_size=1),
            1,
            ["--expert-tensor-parallel-size 1", "needs a model with experts"],
        ),
        (
            MOE,
            dict(expert_model_parallel_size=3),
            3,
            ["--expert-model-parallel-size 3", "8 experts", "Use 1, 2, 4 or 8."],
        ),
        (MOE, dict(expert_model_parallel_size=0), 1, ["--expert-model-parallel-size is 0"]),
        (MOE, dict(tensor_model_parallel_size=2), 2, ["experts", "needs --sequence-parallel"]),
        (
            MOE,
            dict(TP2_SP, expert_tensor_parallel_size=1),
            2,
            [
                "--expert-tensor-parallel-size 1",
                "--tensor-model-parallel-size 2",
                "Use 2, or --expert-model-parallel-size",
            ],
        ),
        (dict(MOE, moe_ffn_hidden_size=33), TP2_SP, 2, ["width 33", "2 processes"]),
        (
            dict(MOE, moe_shared_expert_intermediate_size=33),
            TP2_SP,
            2,
            ["--tensor-model-parallel-size 2", "--moe-shared-expert-intermediate-size 33", "Use 1."],
        ),
        (
            MOE,
            dict(expert_model_parallel_size=4),
            6,
            ["6 processes", "--expert-model-parallel-size 4", "multiple of 4"],
        ),
    ],
)
def test_an_impossible_split_is_refused(model, values, world_size, words):
    message = refused(check_parallel, ParallelConfig(**values), ModelConfig(**model), world_size)
    assert all(word in message for word in words), message
