"""LLaDA2.0 and 2.1: blocks of 32, half of each head rotated, a dense first layer, then experts chosen by sigmoid scores
with a bias, within groups, beside a shared expert.

The bias decides which experts are taken and not how much they count; it is a buffer, and nothing here moves it.

Source: inclusionAI/LLaDA2.0-mini (configuration_llada2_moe.py, modeling_llada2_moe.py); arXiv 2512.15745.
"""

from __future__ import annotations

from typing import Any

from megatron_dlm.checkpoint.hf.families.config import Family, HFConfig
from megatron_dlm.checkpoint.hf.families.qwen3 import gated, read_shape, write_shape
from megatron_dlm.checkpoint.hf.spans import FusedHeads, Same, Vocabulary
from megatron_dlm.config.model import ModelConfig

BLOCK_SIZE, MASK_ID = 32, 156895
_LAYER = "model.layers.{layer}."
TABLE = {
    "embedding.word_embeddings.weight": Vocabulary("model.word_embeddings.weight"),
    "decoder.final_layernorm.weight": Same("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": Same(_LAYER + "input_layernorm.weight"),
    "decoder.layers.self_attention.linear_qkv.weight": FusedHeads(_LAYER + "attention.query_key_value.weight"),
    "decoder.layers.self_attention.q_layernorm.weight": Same(_LAYER + "attention.query_layernorm.weight"),
    "decoder.layers.self_attention.k_layernorm.weight": Same(_LAYER + "attention.key_layernorm.weight"),
    "decoder.layers.self_attention.linear_proj.weight": Same(_LAYER + "attention.dense.weight"),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": Same(_LAYER + "post_attention_layernorm.weight"),
    "decoder.layers.mlp.router.weight": Same(_LAYER + "mlp.gate.weight"),
    "decoder.layers.mlp.router.expert_bias": Same(_LAYER + "mlp.gate.expert_bias"),
    **gated("mlp", _LAYER + "mlp"),
    **gated("mlp.experts.experts", _LAYER + "mlp.experts.{expert}"),
    **gated("mlp.shared_experts", _LAYER + "mlp.shared_experts"),
}


def read(config: HFConfig) -> dict[str, Any]:
    config.refuse(
        score_function=("sigmoid",),
        norm_topk_prob=(True,),
        use_qk_norm=(True,),
        moe_router_enable_expert_bias=(True,),
        **dict.fromkeys(("use_bias", "use_qkv_bias", "norm_head", "expert_capacity"), (False,)),
    )
    experts, shared = config.need("num_experts"), config.get("num_shared_experts", default=0)
    width = config.need("moe_intermediate_size")
    return read_shape(config) | dict(
        qk_layernorm=True,
        block_size=config.get("block_size", default=BLOCK_SIZE),
        rotary_base=config.rotary_base(10000.0),
        rotary_percent=float(config.get("partial_rotary_factor", default=1.0)),
        num_experts=experts,
        moe_router_topk=config.need("num_experts_per_tok"),
        moe_ffn_hidden_size=width,
        moe_first_k_dense=config.get("first_k_dense_replace", default=0),
        moe_shared_expert_intermediate_size=width * shared if shared else None,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=config.get("n_group"),
        moe_router_group_topk=config.get("topk_group"),
        moe_router_topk_scaling_factor=config.get("routed_scaling_factor"),
    )


def write(model: ModelConfig) -> dict[str, Any]:
    shared = model.moe_shared_expert_intermediate_size or 0
    return write_shape(model) | dict(
        model_type="llada2_moe",
        num_experts=model.num_experts,
        num_experts_per_tok=model.moe_router_topk,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        num_shared_experts=shared // model.moe_ffn_hidden_size,
        first_k_dense_replace=model.moe_first_k_dense,
        partial_rotary_factor=model.rotary_percent,
        rotary_dim=int(model.kv_channels * model.rotary_percent),
        n_group=model.moe_router_num_groups,
        topk_group=model.moe_router_group_topk,
        routed_scaling_factor=model.moe_router_topk_scaling_factor,
        score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        router_dtype="fp32",
        norm_topk_prob=True,
        use_qk_norm=True,
        use_bias=False,
        use_qkv_bias=False,
        norm_head=False,
    )


FAMILIES = (Family("llada2", "LLaDA2MoeModelLM", TABLE, read, write, MASK_ID),)
