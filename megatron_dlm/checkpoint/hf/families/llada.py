"""LLaDA 8B and 1.5: full attention, no norm of queries and keys, names of its own.

`ff_proj` is the gate; `ff_out` is the down projection of a block, and the head at the top.

Source: GSAI-ML/LLaDA (configuration_llada.py, modeling_llada.py); arXiv 2502.09992.
"""

from __future__ import annotations

from typing import Any

from megatron_dlm.checkpoint.hf.families.config import Family, HFConfig
from megatron_dlm.checkpoint.hf.spans import Gated, Heads, Same, Vocabulary
from megatron_dlm.config.model import ModelConfig

MASK_ID = 126336
_TOP, _BLOCK = "model.transformer.", "model.transformer.blocks.{layer}."
TABLE = {
    "embedding.word_embeddings.weight": Vocabulary(_TOP + "wte.weight"),
    "decoder.final_layernorm.weight": Same(_TOP + "ln_f.weight"),
    "output_layer.weight": Vocabulary(_TOP + "ff_out.weight"),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": Same(_BLOCK + "attn_norm.weight"),
    "decoder.layers.self_attention.linear_qkv.weight": Heads(*(f"{_BLOCK}{one}_proj.weight" for one in "qkv")),
    "decoder.layers.self_attention.linear_proj.weight": Same(_BLOCK + "attn_out.weight"),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": Same(_BLOCK + "ff_norm.weight"),
    "decoder.layers.mlp.linear_fc1.weight": Gated(_BLOCK + "ff_proj.weight", _BLOCK + "up_proj.weight"),
    "decoder.layers.mlp.linear_fc2.weight": Same(_BLOCK + "ff_out.weight"),
}


def read(config: HFConfig) -> dict[str, Any]:
    config.refuse(
        activation_type=("silu",),
        block_type=("llama",),
        layer_norm_type=("rms",),
        rope=(True,),
        block_group_size=(1,),
        **dict.fromkeys(
            ("attention_layer_norm", "include_bias", "include_qkv_bias", "bias_for_layer_norm", "alibi")
            + ("input_emb_norm", "scale_logits", "multi_query_attention"),
            (False,),
        ),
    )
    hidden, heads = config.need("d_model"), config.need("n_heads")
    ratio = config.get("mlp_ratio", default=4)
    return dict(
        num_layers=config.need("n_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.get("mlp_hidden_size", default=hidden * ratio),
        num_attention_heads=heads,
        num_query_groups=config.get("n_kv_heads", default=heads),
        kv_channels=hidden // heads,
        max_position_embeddings=config.need("max_sequence_length"),
        norm_epsilon=config.get("rms_norm_eps", default=1e-5),
        rotary_base=config.rotary_base(10000.0),
        qk_layernorm=False,
        untie_embeddings_and_output_weights=not config.get("weight_tying", default=True),
        vocab_size=config.get("embedding_size", default=config.need("vocab_size")),
        full_attention=True,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    return dict(
        model_type="llada",
        n_layers=model.num_layers,
        d_model=model.hidden_size,
        mlp_hidden_size=model.ffn_hidden_size,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.num_query_groups,
        max_sequence_length=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rotary_base,
        weight_tying=not model.untie_embeddings_and_output_weights,
        embedding_size=model.vocab_size,
        vocab_size=model.vocab_size,
        activation_type="silu",
        block_type="llama",
        layer_norm_type="rms",
        rope=True,
        block_group_size=1,
    )


FAMILIES = (Family("llada", "LLaDAModelLM", TABLE, read, write, MASK_ID),)
