"""Qwen3, dense and with experts; as a start, too, of the way from autoregressive to block diffusion.

A model that has learned blocks and still predicts a token at the position before it stays one of this family, with its
block size in config.json; one that predicts a token in its own place is SDAR's.

Source: transformers' Qwen3 and Qwen3-MoE (configuration and modelling files, 5.x); arXiv 2505.09388.
"""

from __future__ import annotations

from typing import Any

from megatron_dlm.checkpoint.hf.families.config import Family, HFConfig
from megatron_dlm.checkpoint.hf.spans import Gated, Heads, Same, Vocabulary
from megatron_dlm.config.model import ModelConfig

_LAYER = "model.layers.{layer}."
_ATTENTION = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": Same(_LAYER + "input_layernorm.weight"),
    "decoder.layers.self_attention.linear_qkv.weight": Heads(
        *(f"{_LAYER}self_attn.{one}_proj.weight" for one in "qkv")
    ),
    "decoder.layers.self_attention.linear_proj.weight": Same(_LAYER + "self_attn.o_proj.weight"),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": Same(_LAYER + "post_attention_layernorm.weight"),
}
_NORMS = {
    f"decoder.layers.self_attention.{one}_layernorm.weight": Same(f"{_LAYER}self_attn.{one}_norm.weight")
    for one in "qk"
}
_ENDS = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": Same("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
}


def gated(ours: str, theirs: str) -> dict[str, Gated | Same]:
    """A gated feed-forward layer. Args: prefixes, the second with the name of its layer."""
    return {
        f"decoder.layers.{ours}.linear_fc1.weight": Gated(f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"),
        f"decoder.layers.{ours}.linear_fc2.weight": Same(f"{theirs}.down_proj.weight"),
    }


QWEN2_TABLE = _ENDS | _ATTENTION | gated("mlp", _LAYER + "mlp")
TABLE = QWEN2_TABLE | _NORMS
MOE_TABLE = (
    TABLE
    | {"decoder.layers.mlp.router.weight": Same(_LAYER + "mlp.gate.weight")}
    | gated("mlp.experts.experts", _LAYER + "mlp.experts.{expert}")
)


def read_shape(config: HFConfig) -> dict[str, Any]:
    """The fields that all models of this shape share."""
    config.refuse_scaled_rope()
    config.refuse(hidden_act=("silu",), use_sliding_window=(False,), attention_bias=(False,))
    hidden, heads = config.need("hidden_size"), config.need("num_attention_heads")
    return dict(
        num_layers=config.need("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.need("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads", default=heads),
        kv_channels=config.get("head_dim", default=hidden // heads),
        max_position_embeddings=config.get("max_position_embeddings", default=32768),
        norm_epsilon=config.get("rms_norm_eps", default=1e-6),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", default=False),
        vocab_size=config.need("vocab_size"),
    )


def read(config: HFConfig) -> dict[str, Any]:
    return read_shape(config) | dict(
        qk_layernorm=True,
        block_size=config.get("block_size", default=1),
        logit_shift=1,
        rotary_base=config.rotary_base(10000.0),
    )


def read_experts(config: HFConfig) -> dict[str, Any]:
    config.refuse(decoder_sparse_step=(1,), mlp_only_layers=([],))
    fields = dict(
        num_experts=config.need("num_experts", "num_local_experts"),
        moe_router_topk=config.need("num_experts_per_tok"),
        moe_ffn_hidden_size=config.need("moe_intermediate_size"),
    )
    if not config.get("norm_topk_prob", default=False):
        fields["transformer_overrides"] = {"moe_router_pre_softmax": True}
    return fields


def read_moe(config: HFConfig) -> dict[str, Any]:
    return read(config) | read_experts(config)


def write_shape(model: ModelConfig) -> dict[str, Any]:
    return dict(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rotary_base,  # also where newer readers look for rope_parameters: others know only this
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        vocab_size=model.vocab_size,
        hidden_act="silu",
    )


def write(model: ModelConfig) -> dict[str, Any]:
    blocks = {} if model.block_size == 1 else {"block_size": model.block_size}
    return write_shape(model) | dict(model_type="qwen3", attention_bias=False, **blocks)


def write_experts(model: ModelConfig) -> dict[str, Any]:
    return dict(
        num_experts=model.num_experts,
        num_experts_per_tok=model.moe_router_topk,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        norm_topk_prob=not model.transformer_overrides.get("moe_router_pre_softmax", False),
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def write_moe(model: ModelConfig) -> dict[str, Any]:
    return write(model) | write_experts(model) | dict(model_type="qwen3_moe")


FAMILIES = (
    Family("qwen3", "Qwen3ForCausalLM", TABLE, read, write, with_blocks="sdar"),
    Family("qwen3-moe", "Qwen3MoeForCausalLM", MOE_TABLE, read_moe, write_moe, with_blocks="sdar-moe"),
)
