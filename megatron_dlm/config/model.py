"""The shape of the model: what a preset or the user says about the transformer.

A field that is None is filled from the preset, or derived, when the model is built; a field that the user gives always
beats the preset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

NOT_OF_THE_WEIGHTS = ("init_method_std", "bf16", "fp64")
"""Fields of a run, which say nothing about weights that are stored: how they are first drawn, and in what kept."""


@dataclass(slots=True)
class ModelConfig:
    """The shape of the model."""

    model_preset: str | None = None
    """Name of a known model (tiny, tiny-moe, sdar-1.7b, sdar-4b, sdar-8b, sdar-30b-a3b, llada-8b, dream-7b or
    llada2-mini); it fills every shape below that is not given."""
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
    rotary_percent: float | None = None
    """Part of each head's channels that the rotary position embedding turns, from above 0 to 1; the first ones."""
    norm_epsilon: float | None = None
    """Epsilon inside the normalisation layers."""
    qk_layernorm: bool | None = None
    """Normalise queries and keys, per head, before attention."""
    add_qkv_bias: bool | None = None
    """Add a bias to queries, keys and values."""
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
    moe_first_k_dense: int | None = None
    """Number of layers at the beginning that have a plain feed-forward layer instead of experts."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of the expert that every token goes to besides those it is routed to; none gives no such expert."""
    moe_router_score_function: Literal["softmax", "sigmoid"] | None = None
    """What turns the router's logits into the scores of the experts."""
    moe_router_enable_expert_bias: bool | None = None
    """Choose experts by score plus a bias of each expert, which stays as it was loaded; the weights of the chosen ones
    come from the scores alone."""
    moe_router_num_groups: int | None = None
    """Split the experts into this many groups, of which each token uses some."""
    moe_router_group_topk: int | None = None
    """Number of expert groups that each token may use: those with the highest sum of their two best scores."""
    moe_router_topk_scaling_factor: float | None = None
    """Multiply the weights of the chosen experts by this."""
    block_size: int | None = None
    """Attention block of the block-diffusion layout, in tokens, which see each other in both directions."""
    full_attention: bool | None = None
    """Let every token see the whole text, as if it were one attention block; without --block-size."""
    logit_shift: int | None = None
    """1 where the model predicts a token at the position before it, as models do that were made from autoregressive
    ones; 0 where it predicts a token in its own place."""
    transformer_overrides: dict[str, Any] = field(default_factory=dict, metadata={"flag": "--transformer-override"})
    """Any field of megatron-core's TransformerConfig, as KEY=VALUE with a YAML value; may be given several times."""
    bf16: bool = False
    """Keep and compute the parameters in bfloat16 instead of float32."""
    fp64: bool = False
    """Compute in float64, in which results can be compared token by token; not for training."""

    @property
    def is_autoregressive(self) -> bool:
        """Whether it predicts each token from those before it, and knows no mask. Of a resolved model."""
        return self.block_size == 1 and bool(self.logit_shift)
