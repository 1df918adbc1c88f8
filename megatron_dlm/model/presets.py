"""Model sizes by name. A preset fills the fields of `ModelConfig` that were not given; a flag beats it.

SDAR and TraDo have the shape of Qwen3 with an untied head at every size.
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

PRESETS: dict[str, dict[str, object]] = {
    "tiny": dict(
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
    ),
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
}
