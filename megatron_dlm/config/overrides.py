"""Which fields of megatron-core's TransformerConfig a user may set, and to what.

Invariant (tests/config/test_overrides.py): what is accepted has the type that megatron-core declares and reaches a
layer that reads it; what would be ignored, or would break a promise of this package (draws that resume, rows that are
packed, one shape for training and rollout), is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name, one_of
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig

FLAG = "--transformer-override"

# TransformerConfig's names for what has a flag of its own under another name
_OTHER_NAMES = {
    "num_moe_experts": "num_experts",
    "layernorm_epsilon": "norm_epsilon",
    "params_dtype": "bf16",
    "pipeline_dtype": "bf16",
    "autocast_dtype": "bf16",
}

# What our layers do not read or cannot keep their promises with: exact names, or beginnings that end in "*"
_REFUSED = {
    "dropout is not supported, because its draws could not be resumed": ("hidden_dropout", "attention_dropout"),
    "the layers of this package have a norm of their own, an RMSNorm": (
        "normalization",
        "layernorm_zero_centered_gamma",
        "memory_efficient_layer_norm",
        "persist_layer_norm",
        "qk_l2_norm",
    ),
    "the layers of this package have an attention of their own, which does not read it": (
        "attention_backend",
        "attention_softmax_in_fp32",
        "apply_query_key_layer_scaling",
        "masked_softmax_fusion",
        "softmax_type",
        "window_*",
        "qk_clip*",
        "log_max_attention_logit",
        "multi_latent_attention",
        "experimental_attention_variant",
        "dsa_*",
        "linear_*",
        "flash_decode",
        "batch_invariant_mode",
    ),
    "the layers of this package have rotary positions of their own": (
        "rotary_interleaved",
        "no_rope_freq",
        "mrope_section",
        "apply_rope_fusion",
        "fused_single_qkv_rope",
    ),
    "the layers of this package have a context parallelism of their own": (
        "cp_comm_type",
        "hierarchical_context_parallel_sizes",
        "hybrid_context_parallel",
        "max_seqlen_per_dp_cp_rank",
    ),
    "pipeline stages have equal shares of the layers; --num-virtual-stages-per-pipeline-rank interleaves them": (
        "virtual_pipeline_model_parallel_size",
        "microbatch_group_size_per_vp_stage",
        "overlap_p2p_comm*",
        "num_layers_in_*",
        "pipeline_model_parallel_layout",
        "account_for_*",
        "variable_seq_lengths",
    ),
    "other kinds of layers than a transformer's are not supported": (
        "is_hybrid_model",
        "mamba_*",
        "use_mamba_mem_eff_path",
        "heterogeneous_block_specs",
        "hetereogenous_dist_checkpoint",
        "mtp_*",
    ),
    "this package decides on it": (
        "calculate_per_token_loss",
        "perform_initialization",
        "use_cpu_initialization",
        "init_model_with_meta_device",
        "fp16",
        "enable_autocast",
        "test_mode",
        "config_logger_dir",
        "moe_router_bias_update_rate",
    ),
    "flags of this package choose layers and precision, and CUDA graphs are not supported in training": (
        "transformer_impl",
        "use_te_*",
        "tp_comm_*",
        "use_kitchen*",
        "kitchen_*",
        "fp8*",
        "fp4*",
        "activation_func_fp8_input_store",
        "first_last_layers_bf16",
        "num_layers_at_*",
        "enable_cuda_graph",
        "external_cuda_graph",
        "cuda_graph_*",
        "delay_wgrad_compute",
        "inference_*",
        "use_inference_optimized_layers",
    ),
    "dropping tokens would make the result depend on how rows are packed": (
        "moe_token_dropping",
        "moe_expert_capacity_factor",
        "moe_pad_expert_input_to_capacity",
        "moe_input_jitter_eps",
    ),
}

# What may differ between a checkpoint and the run that loads it, because it changes memory, speed or the training
# signal but not the function
_NOT_THE_FUNCTION = (
    "recompute_",
    "distribute_saved_",
    "cpu_offloading",
    "fine_grained_",
    "offload_",
    "moe_aux_",
    "moe_z_",
    "overlap_",
)


# Settings of a run that have a flag and may be given as overrides instead; config/validate_recompute.py refuses both
EITHER_WAY = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")


def check_overrides(model: ModelConfig) -> None:
    """Refuse an override that contradicts a flag, that nobody would read, or that has the wrong type."""
    own = {field.name for config in (ModelConfig, ParallelConfig) for field in dataclasses.fields(config)}
    own -= set(EITHER_WAY)
    for name, value in model.transformer_overrides.items():
        ours = _OTHER_NAMES.get(name, name)
        if ours in own:
            raise ConfigError(f"{FLAG} {name} would contradict a flag. Use {flag_name(ours)}.")
        reason = _refusal(name)
        if reason is not None:
            raise ConfigError(f"{FLAG} {name}: {reason}. Leave it out.")
        _check_type(name, value)


def of_the_function(overrides: dict[str, Any]) -> dict[str, Any]:
    """Those overrides that change what the model computes."""
    return {name: value for name, value in overrides.items() if not name.startswith(_NOT_THE_FUNCTION)}


def _refusal(name: str) -> str | None:
    for reason, patterns in _REFUSED.items():
        if any(name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for pattern in patterns):
            return reason
    return None


def _check_type(name: str, value: Any) -> None:
    hints = _hints()
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Check its spelling."
        raise ConfigError(f"{FLAG} {name}: megatron-core's TransformerConfig has no such field. {hint}")
    words = _accepted(hints[name])
    if not words:
        raise ConfigError(f"{FLAG} {name} cannot be given as text. Leave it out.")
    if not _fits(hints[name], value):
        raise ConfigError(f"{FLAG} {name} needs {one_of(words)}, not {value!r}. Correct the value.")


@lru_cache(maxsize=1)
def _hints() -> dict[str, Any]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return get_type_hints(TransformerConfig)


_NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    type(None): "null",
}


def _accepted(hint: Any) -> list[str]:
    """What a YAML value of this type may be, in words; nothing for types that YAML cannot express."""
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        words = [word for part in get_args(hint) for word in _accepted(part)]
        return words if any(word != "null" for word in words) else []
    if origin is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [_NOUNS[list if origin is tuple else origin]] if origin in (*_NOUNS, tuple) else []


def _fits(hint: Any, value: Any) -> bool:
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return any(_fits(part, value) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits((get_args(hint) or (Any,))[0], item) for item in value)
    if origin is float:
        return type(value) in (int, float)
    return origin is Any or type(value) is origin
