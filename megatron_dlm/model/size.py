"""How many parameters a model has, counted from its shape: nothing is built.

Invariant (tests/model/test_size.py): the number is that of the model that megatron-core builds, as long as no override
of its TransformerConfig changes the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Numbers of parameters, over all processes.

    Attributes:
        body: layers and final norm. idle: those of `body` that a token does not pass, in experts it is not sent to.
        embedding, head: the tables of the padded vocabulary; a tied head has none of its own.
        value: of a value model with the same body, which has one line of weights for a head.
    """

    body: int
    idle: int
    embedding: int
    head: int
    value: int

    @property
    def total(self) -> int:
        """Of the policy."""
        return self.body + self.embedding + self.head

    @property
    def active(self) -> int:
        """Of the policy, for one token."""
        return self.total - self.idle


def model_size(model: ModelConfig) -> ModelSize:
    """Sizes of a resolved and checked configuration."""
    width = model.hidden_size
    attention, norms = _attention(model), 2 * width
    dense = 3 * width * model.ffn_hidden_size
    experts = idle = 0
    sparse_layers = 0
    if model.num_experts is not None:
        sparse_layers = model.num_layers - model.moe_first_k_dense
        one = 3 * width * model.moe_ffn_hidden_size
        shared = 3 * width * (model.moe_shared_expert_intermediate_size or 0)
        experts = width * model.num_experts + model.num_experts * one + shared  # a router, experts, the shared one
        idle = sparse_layers * (model.num_experts - model.moe_router_topk) * one
    dense_layers = model.num_layers - sparse_layers
    body = model.num_layers * (attention + norms) + dense_layers * dense + sparse_layers * experts + width
    multiple = model.make_vocab_size_divisible_by
    table = -(-model.vocab_size // multiple) * multiple * width
    head = table if model.untie_embeddings_and_output_weights else 0
    return ModelSize(body, idle, table, head, body + table + width)


def _attention(model: ModelConfig) -> int:
    """Parameters of one attention layer: queries, keys, values, their biases and norms, and the way back."""
    queries = model.num_attention_heads * model.kv_channels
    all_three = queries + 2 * model.num_query_groups * model.kv_channels
    weights = model.hidden_size * (all_three + queries)
    return weights + (all_three if model.add_qkv_bias else 0) + (2 * model.kv_channels if model.qk_layernorm else 0)
