"""Model sizes by name. A preset fills the fields of `ModelConfig` that were not given; a flag beats it.

SDAR and TraDo have the shape of Qwen3 with an untied head at every size, Dream and DiffuCoder that of Qwen2.5-7B, LLaDA
that of Llama with as many key/value heads as heads. LLaDA2 is a mixture of experts with a router of its own.
"""

from __future__ import annotations

_QWEN3 = dict(
    max_position_embeddings=32768,
    rotary_base=1e6,
    norm_epsilon=1e-6,
    qk_layernorm=True,
    untie_embeddings_and_output_weights=True,
)
_SDAR = dict(_QWEN3, kv_channels=128, vocab_size=151936, block_size=4)
_TINY = dict(
    _QWEN3,
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    max_position_embeddings=2048,
    rotary_base=1e4,
    block_size=4,
)

PRESETS: dict[str, dict[str, object]] = {
    "tiny": _TINY,
    "tiny-moe": dict(_TINY, num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=96),
    "sdar-1.7b": dict(
        _SDAR, num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16, num_query_groups=8
    ),
    "sdar-4b": dict(
        _SDAR, num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, num_query_groups=8
    ),
    "sdar-8b": dict(
        _SDAR, num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8
    ),
    "sdar-30b-a3b": dict(
        _SDAR,
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        num_experts=128,
        moe_router_topk=8,
        moe_ffn_hidden_size=768,
    ),
    "llada-8b": dict(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=128,
        max_position_embeddings=4096,
        rotary_base=5e5,
        norm_epsilon=1e-5,
        qk_layernorm=False,
        untie_embeddings_and_output_weights=True,
        vocab_size=126464,
        full_attention=True,
    ),
    "dream-7b": dict(
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        kv_channels=128,
        max_position_embeddings=131072,
        rotary_base=1e6,
        norm_epsilon=1e-6,
        qk_layernorm=False,
        add_qkv_bias=True,
        untie_embeddings_and_output_weights=True,
        vocab_size=152064,
        full_attention=True,
        logit_shift=1,
    ),
    "llada2-mini": dict(
        num_layers=20,
        hidden_size=2048,
        ffn_hidden_size=5120,
        num_attention_heads=16,
        num_query_groups=4,
        kv_channels=128,
        max_position_embeddings=32768,
        rotary_base=6e5,
        rotary_percent=0.5,
        norm_epsilon=1e-6,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
        vocab_size=157184,
        block_size=32,
        num_experts=256,
        moe_router_topk=8,
        moe_ffn_hidden_size=512,
        moe_first_k_dense=1,
        moe_shared_expert_intermediate_size=512,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        moe_router_topk_scaling_factor=2.5,
    ),
}
