"""From `ModelConfig` to what megatron-core wants to know.

`resolve` fills a ModelConfig from its preset and the tokenizer; `transformer_config` makes megatron-core's
TransformerConfig of it, passing through the fields that the user named; `ModelShape` carries the sizes that
TransformerConfig has no field for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.model.presets import PRESETS

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")

# Fields of TransformerConfig that our layers, or the programs above them, would silently not follow.
_NOT_FOLLOWED = frozenset(
    {
        # attention is LayoutAttention: all heads, no dropout, who sees whom is the layout's to say
        *("attention_dropout", "attention_backend", "attention_softmax_in_fp32", "apply_query_key_layer_scaling"),
        *("softmax_type", "window_size", "window_attn_skip_freq", "qk_clip", "log_max_attention_logit"),
        *("multi_latent_attention", "experimental_attention_variant", "linear_attention_freq"),
        *("hierarchical_context_parallel_sizes", "cp_comm_type"),
        # positions are RotaryByPosition, norms are our RMSNorm
        *("rotary_interleaved", "mrope_section"),
        *("normalization", "layernorm_zero_centered_gamma", "qk_l2_norm"),
        # layers are those of megatron-core's local or Transformer Engine spec, with or without experts
        *("transformer_impl", "fp8", "fp4", "mtp_num_layers", "heterogeneous_block_specs", "is_hybrid_model"),
        *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl"),
        # processes are the groups' to know
        *("context_parallel_size", "virtual_pipeline_model_parallel_size"),
        # a target's weight is in the loss already; the rollout model draws no weights
        *("calculate_per_token_loss", "perform_initialization", "use_cpu_initialization"),
    }
)

# Fields of TransformerConfig that megatron-core's fused SwiGLU refuses, or silently does not follow.
_ANOTHER_SWIGLU = frozenset({"activation_func_clamp_value", "glu_linear_offset", "use_te_activation_func"})


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that TransformerConfig has no field for.

    Attributes:
        vocab_size: real tokens.
        padded_vocab_size: rows of the embedding, whatever the tensor-parallel size.
        max_position_embeddings, rotary_base, rotary_percent, logit_shift: as in ModelConfig.
        tie_embeddings: the head uses the embedding's weights.
    """

    vocab_size: int
    padded_vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    tie_embeddings: bool
    rotary_percent: float = 1.0
    logit_shift: int = 0


def resolve(model: ModelConfig, tokenizer_vocab_size: int | None) -> ModelConfig:
    """The same configuration with every size filled in: flag, then preset, then a default derived from the others.

    Raises:
        ConfigError: an unknown preset, a size that nobody gives, or a vocabulary smaller than the tokenizer's.
    """
    if model.model_preset is not None and model.model_preset not in PRESETS:
        raise ConfigError(f"--model-preset {model.model_preset} is not known. Use one of: {', '.join(PRESETS)}.")
    filled = dataclasses.replace(model)
    defaults = dict(PRESETS.get(model.model_preset, {}))
    defaults.setdefault("vocab_size", tokenizer_vocab_size)
    if model.full_attention:
        defaults.pop("block_size", None)
    for field in dataclasses.fields(filled):
        if getattr(filled, field.name) is None and field.name in defaults:
            setattr(filled, field.name, defaults[field.name])
    for name in _REQUIRED if filled.full_attention else (*_REQUIRED, "block_size"):
        if getattr(filled, name) is None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is not set. Give it, or choose a --model-preset ({', '.join(PRESETS)})."
            )
    if tokenizer_vocab_size is not None and tokenizer_vocab_size > filled.vocab_size:
        raise ConfigError(
            f"--vocab-size {filled.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size} tokens. "
            "Leave it out of a new model, or use the tokenizer of the one that is loaded."
        )
    if filled.ffn_hidden_size is None:
        filled.ffn_hidden_size = 4 * filled.hidden_size
    derived = dict(
        num_query_groups=filled.num_attention_heads,
        kv_channels=_width_of_a_head(filled.hidden_size, filled.num_attention_heads),
        max_position_embeddings=4096,
        rotary_base=1e6,
        norm_epsilon=1e-6,
        rotary_percent=1.0,
        qk_layernorm=True,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=True,
        moe_ffn_hidden_size=filled.ffn_hidden_size,
        full_attention=False,
        logit_shift=0,
    )
    if filled.num_experts is not None:
        derived |= dict(moe_first_k_dense=0, moe_router_score_function="softmax", moe_router_enable_expert_bias=False)
    for name, value in derived.items():
        if getattr(filled, name) is None:
            setattr(filled, name, value)
    return filled


def _width_of_a_head(hidden_size: int, heads: int) -> int | None:
    """None where it does not come out even, which config.validate refuses."""
    return hidden_size // heads if heads > 0 and hidden_size % heads == 0 else None


def _layers_with_experts(model: ModelConfig) -> int | list[int]:
    """megatron-core's `moe_layer_freq`: 1 for all layers, or a 0 or 1 for each."""
    dense = model.moe_first_k_dense
    return [0] * dense + [1] * (model.num_layers - dense) if dense else 1


def rotary_width(kv_channels: int, rotary_percent: float) -> int:
    """Channels of a head that rotary positions turn."""
    return int(kv_channels * rotary_percent)


def model_shape(model: ModelConfig) -> ModelShape:
    """Sizes of a resolved ModelConfig."""
    multiple = model.make_vocab_size_divisible_by
    return ModelShape(
        vocab_size=model.vocab_size,
        padded_vocab_size=-(-model.vocab_size // multiple) * multiple,
        max_position_embeddings=model.max_position_embeddings,
        rotary_base=model.rotary_base,
        tie_embeddings=not model.untie_embeddings_and_output_weights,
        rotary_percent=model.rotary_percent,
        logit_shift=model.logit_shift,
    )


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype | None = None, **extra: object):
    """megatron-core's TransformerConfig for a resolved ModelConfig.

    Args:
        dtype: of the parameters; by default as the configuration says.
        extra: further fields, for callers that build a second model in another layout. The user's overrides beat them.

    Raises:
        ConfigError: an override that TransformerConfig does not have, that our layers do not follow, or that does not
            fit the rest.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = dtype or (torch.bfloat16 if model.bf16 else torch.float64 if model.fp64 else torch.float32)
    values = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        init_method_std=model.init_method_std,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        autocast_dtype=dtype,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        transformer_impl=parallel.transformer_impl,
    )
    if parallel.transformer_impl == "transformer_engine":
        values |= _of_transformer_engine(model, parallel)
    if parallel.recompute_granularity is not None:
        values |= dict(
            recompute_granularity=parallel.recompute_granularity,
            recompute_method=parallel.recompute_method,
            recompute_num_layers=parallel.recompute_num_layers,
            recompute_modules=parallel.recompute_modules and list(parallel.recompute_modules),
        )
    if parallel.expert_tensor_parallel_size is not None:
        values["expert_tensor_parallel_size"] = parallel.expert_tensor_parallel_size
    if model.num_experts is not None:
        values |= dict(
            num_moe_experts=model.num_experts,
            moe_router_topk=model.moe_router_topk,
            moe_ffn_hidden_size=model.moe_ffn_hidden_size,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
            moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
            moe_layer_freq=_layers_with_experts(model),
            moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
            moe_router_score_function=model.moe_router_score_function,
            moe_router_enable_expert_bias=model.moe_router_enable_expert_bias,
            moe_router_bias_update_rate=0.0,  # training and rollout must choose alike, and the released models keep it
            moe_router_num_groups=model.moe_router_num_groups,
            moe_router_group_topk=model.moe_router_group_topk,
            moe_router_topk_scaling_factor=model.moe_router_topk_scaling_factor,
        )
    values |= extra
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    for name, value in model.transformer_overrides.items():
        if name not in defaults:
            raise ConfigError(
                f"--transformer-override {name}: megatron-core's TransformerConfig has no such field. "
                "Check its spelling."
            )
        if name in _NOT_FOLLOWED and value != values.get(name, defaults[name]):
            raise ConfigError(
                f"--transformer-override {name}={value}: the layers of this model do not follow that field. "
                "Leave it out."
            )
    # Fields come and go between megatron-core releases; those that this one lacks are at the value that we want.
    values = {name: value for name, value in values.items() if name in defaults} | model.transformer_overrides
    try:
        return TransformerConfig(**values)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        if not model.transformer_overrides:
            raise
        raise refused_overrides(model, error) from error


def _of_transformer_engine(model: ModelConfig, parallel: ParallelConfig) -> dict[str, object]:
    """Fields of a model of Transformer Engine's layers."""
    values: dict[str, object] = dict(
        # Its kernel takes one row of angles per token, which is what RotaryByPosition makes whatever the positions are.
        apply_rope_fusion=True,
        # SwiGLU is one kernel forward and one backward, which torch compiles; on a CPU that takes longer than it saves.
        # bias_dropout_fusion stays off: without biases and dropout only an addition is left, which is one kernel.
        # gradient_accumulation_fusion does, too: these layers could, but megatron-core refuses a head with it unless
        # Apex's fused_weight_gradient_mlp_cuda is there; who has that may override it.
        bias_activation_fusion=platform.is_cuda() and one_kernel_for_gates(model),
    )
    if model.num_experts is not None:
        values["moe_grouped_gemm"] = True
    if parallel.fp8_format is not None:
        values |= dict(
            fp8=parallel.fp8_format,
            fp8_recipe=parallel.fp8_recipe,
            fp8_param=parallel.fp8_param_gather,
            fp8_margin=parallel.fp8_margin,
            fp8_amax_history_len=parallel.fp8_amax_history_len,
            fp8_amax_compute_algo=parallel.fp8_amax_compute_algo,
            first_last_layers_bf16=parallel.first_last_layers_bf16,
            num_layers_at_start_in_bf16=parallel.num_layers_at_start_in_bf16,
            num_layers_at_end_in_bf16=parallel.num_layers_at_end_in_bf16,
        )
    return values


def one_kernel_for_gates(model: ModelConfig) -> bool:
    """Whether fused layers compute SwiGLU in one kernel on a GPU: it is megatron-core's own, and not another."""
    overrides = model.transformer_overrides
    return _ANOTHER_SWIGLU.isdisjoint(overrides) and bool(overrides.get("bias_activation_fusion", True))


def refused_overrides(model: ModelConfig, error: BaseException) -> ConfigError:
    """What to tell when megatron-core cannot make the model that the user's overrides ask for."""
    given = ", ".join(f"{name}={value}" for name, value in model.transformer_overrides.items())
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return ConfigError(
        f"megatron-core refuses this model ({reason}). Correct or leave out --transformer-override {given}."
    )
