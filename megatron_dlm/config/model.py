"""The shape of the model: what a preset or the user says about the transformer.

A field that is None is filled from the preset, or derived, when the model is built; a field that the user gives always
beats the preset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class ModelConfig:
    """The shape of the model."""

    model_preset: str | None = None
    """Name of a known model (tiny, sdar-1.7b, sdar-4b, sdar-8b or sdar-30b-a3b); it fills every shape below that is not
    given."""
    num_layers: int | None = None
    """Number of transformer layers."""
    hidden_size: int | None = None
    """Width of the hidden states."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layers."""
    num_attention_heads: int | None = None
    """Number of attention heads."""
    num_query_groups: int | None = None
    """Number of key/value heads, each shared by a group of attention heads."""
    kv_channels: int | None = None
    """Width of one attention head."""
    max_position_embeddings: int | None = None
    """Longest position that the model was made for."""
    rotary_base: float | None = None
    """Base period of the rotary position embedding."""
    norm_epsilon: float | None = None
    """Epsilon inside the normalisation layers."""
    qk_layernorm: bool | None = None
    """Normalise queries and keys, per head, before attention."""
    untie_embeddings_and_output_weights: bool | None = None
    """Give the output layer its own weights instead of those of the input embedding."""
    vocab_size: int | None = None
    """Number of token ids before padding; taken from the tokenizer when it is not given."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this, the same for every tensor-parallel size."""
    init_method_std: float = 0.02
    """Standard deviation of freshly drawn weights."""
    num_experts: int | None = None
    """Number of experts in a mixture-of-experts layer; none gives a dense model."""
    moe_router_topk: int | None = None
    """Number of experts that each token goes to."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert's feed-forward layer."""
    block_size: int | None = None
    """Attention block of the block-diffusion layout, in tokens, which see each other in both directions."""
    transformer_overrides: dict[str, Any] = field(default_factory=dict, metadata={"flag": "--transformer-override"})
    """Any field of megatron-core's TransformerConfig, as KEY=VALUE with a YAML value; may be given several times."""
    bf16: bool = False
    """Keep and compute the parameters in bfloat16 instead of float32."""
    fp64: bool = False
    """Compute in float64, in which results can be compared token by token; not for training."""
