"""A small causal GPT of unmodified megatron-core parts, and rows for it: what the tests of training, checkpoints and
refit run.

It knows nothing of diffusion. Layouts that are to be compared start from one checkpoint: each draws other initial
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 16


class Norm(nn.Module):
    """RMSNorm that, unlike torch's, tells megatron-core about sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps) * self.weight


@dataclass(frozen=True)
class Setup:
    """One layout and one way to train; every field has the plainest value as default."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    virtual: int | None = None
    sequence_parallel: bool = False
    distributed: bool = False
    overlap: bool = False
    optimizer: str = "adam"
    momentum: float = 0.0
    bf16: bool = False
    float64: bool = False
    tied: bool = False
    experts: int | None = None
    auxiliary: float = 0.0
    expert_bias: bool = False
    hidden: int = 32
    layers: int = 4
    clip: float = 0.5
    weight_decay: float = 0.1


def make(setup: Setup, train_iters: int = 10, with_optimizer: bool = True):
    """Join the layout of `setup` and build its TrainState."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.state import TrainState

    parallel = ParallelConfig(
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        expert_model_parallel_size=setup.ep,
        expert_tensor_parallel_size=1 if setup.ep > 1 else None,
        sequence_parallel=setup.sequence_parallel,
        use_distributed_optimizer=setup.distributed,
        overlap_grad_reduce=setup.overlap,
        overlap_param_gather=setup.overlap and setup.distributed,
    )
    groups = initialize(parallel, seed=1)
    config = transformer_config(setup)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None) -> nn.Module:
        return gpt(setup, config, groups, pre_process, post_process, vp_stage)

    optimizer = OptimizerConfig(
        optimizer=setup.optimizer,
        lr=1e-2,
        min_lr=1e-3,
        lr_decay_style="linear",
        lr_warmup_iters=1,
        adam_eps=1e-3,
        sgd_momentum=setup.momentum,
        clip_grad=setup.clip,
        weight_decay=setup.weight_decay,
    )
    state = TrainState.build(build, config, optimizer if with_optimizer else None, parallel, groups, train_iters)
    return state


def transformer_config(setup: Setup):
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if setup.bf16 else torch.float64 if setup.float64 else torch.float32
    moe = (
        {}
        if setup.experts is None
        else {
            "num_moe_experts": setup.experts,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 32,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss" if setup.auxiliary else "none",
            "moe_aux_loss_coeff": setup.auxiliary,
            "moe_router_enable_expert_bias": setup.expert_bias,
            "moe_router_score_function": "sigmoid" if setup.expert_bias else "softmax",
            "expert_model_parallel_size": setup.ep,
            "expert_tensor_parallel_size": 1 if setup.ep > 1 else setup.tp,
            "moe_router_dtype": "fp32",
        }
    )
    return TransformerConfig(
        num_layers=setup.layers,
        hidden_size=setup.hidden,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=setup.bf16,
        params_dtype=dtype,
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        pipeline_dtype=dtype,
        virtual_pipeline_model_parallel_size=setup.virtual,
        sequence_parallel=setup.sequence_parallel,
        qk_layernorm=True,
        **moe,
    )


def gpt(
    setup: Setup,
    config: Any,
    groups: Any,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec(num_experts=setup.experts, normalization="RMSNorm", qk_layernorm=True)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = Norm
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp_rank)
    block = TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)
    model = GPTModel(
        config,
        block,
        VOCABULARY,
        LENGTH,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=setup.tied,
        pg_collection=groups.pg_collection,
        vp_stage=vp_stage,
    )
    return model


def rows(count: int, seed: int = 0) -> list[Tensor]:
    """Token rows [1, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator) for _ in range(count)]


def share(state: Any, everything: list[Tensor]) -> list[Tensor]:
    """The rows of this data-parallel rank."""
    return everything[state.groups.dp_rank :: state.groups.dp_size]


def forward_step(row: Tensor, model: nn.Module):
    """Sum over next-token losses, with weights that sum to 1 over an update of four rows."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    mask = torch.ones(LENGTH, LENGTH).tril().logical_not()[None, None]
    output = model(row, torch.arange(LENGTH)[None], mask)

    def loss(logits: Tensor):
        losses = vocab_parallel_cross_entropy(
            logits.transpose(0, 1).to(torch.promote_types(logits.dtype, torch.float32)).contiguous(), row.T
        )[:-1]
        return losses.sum() / (4 * (LENGTH - 1)), {
            "tokens": torch.tensor(LENGTH - 1.0),
            "half": losses.detach().sum() / 2,
        }

    return output, loss


def whole(state: Any, values: dict[str, Tensor], groups: Any = None) -> dict[str, Tensor]:
    """Gather this model-parallel group's shards into the tensors of the whole model. `values` has the names of
    state.named_parameters().
    """
    from megatron_dlm.parallel.exchange import gather_objects

    groups = groups or state.groups
    parameters = dict(state.named_parameters())
    mine = {
        name: (
            value.detach().clone().contiguous(),
            getattr(parameters[name], "partition_dim", -1)
            if getattr(parameters[name], "tensor_model_parallel", False)
            else -1,
            "linear_fc1" in name,
        )
        for name, value in values.items()
    }
    merged: dict[str, Tensor] = {}
    for stage in gather_objects([gather_objects(mine, groups.tp)], groups.pp):
        for name in stage[0][0]:
            shards = [rank[name][0] for rank in stage[0]]
            dimension, gated = stage[0][0][name][1:]
            if dimension < 0 or len(shards) == 1:
                merged.setdefault(name, shards[0])
            elif gated:  # [gate; up] halves are sharded one by one
                halves = [shard.chunk(2, dim=0) for shard in shards]
                merged.setdefault(name, torch.cat([half[0] for half in halves] + [half[1] for half in halves]))
            else:
                merged.setdefault(name, torch.cat(shards, dim=dimension))
    return merged
