"""Transformer Engine's layers and FP8 that cannot be, refused before anything is built. The rules are those of
`validate`; what this machine has is platform/te.py's to say.
"""

from __future__ import annotations

from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig, PrecisionConfig

_OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_OF_ENDS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_OF_FP8 = ("fp8_recipe", "fp8_param_gather", "first_last_layers_bf16", *_OF_DELAYED, *_OF_ENDS)
_ENGINE = "--transformer-impl transformer_engine"


def check_fp8(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Refuse layers of Transformer Engine, or FP8, that do not go with themselves, the model or its layout.

    Args:
        parallel: its sizes have been checked. model: has been checked.
    """
    if parallel.transformer_impl == "transformer_engine" and model.fp64:
        raise ConfigError(f"--fp64 does not work with {_ENGINE}, which has no float64. Leave one of the two out.")
    plain = PrecisionConfig()
    if parallel.fp8_format is None:
        for name in _OF_FP8:
            if getattr(parallel, name) != getattr(plain, name):
                raise ConfigError(
                    f"{_told(parallel, name)} does nothing without --fp8-format. Add it, or leave it out."
                )
        return
    if parallel.transformer_impl != "transformer_engine":
        raise ConfigError(f"--fp8-format {parallel.fp8_format} needs {_ENGINE}. Add it.")
    if not model.bf16:
        raise ConfigError(f"--fp8-format {parallel.fp8_format} needs --bf16. Add it.")
    if parallel.fp8_recipe != "delayed":
        for name in _OF_DELAYED:
            if getattr(parallel, name) != getattr(plain, name):
                raise ConfigError(
                    f"{_told(parallel, name)} is for --fp8-recipe delayed, and this run uses {parallel.fp8_recipe}. "
                    "Leave it out."
                )
    if parallel.fp8_margin < 0 or parallel.fp8_amax_history_len < 1:
        raise ConfigError(
            f"--fp8-margin {parallel.fp8_margin} and --fp8-amax-history-len {parallel.fp8_amax_history_len} must be at "
            "least 0 and 1. Correct them."
        )
    _check_ends(parallel, model)
    _check_gather(parallel)
    _check_recompute(parallel)
    _check_widths(parallel, model)


def check_fp8_optimizer(parallel: ParallelConfig, optimizer: OptimizerConfig) -> None:
    """Refuse an optimizer that cannot update weights in FP8."""
    if parallel.fp8_param_gather and optimizer.optimizer_cpu_offload:
        raise ConfigError("--fp8-param-gather does not work with --optimizer-cpu-offload. Leave one of the two out.")


def check_fp8_weights(parallel: ParallelConfig, checkpoint: LoadConfig) -> None:
    """Refuse to fill weights that are kept in FP8 slice by slice, as the reader of HuggingFace checkpoints does."""
    if parallel.fp8_param_gather and checkpoint.hf_checkpoint is not None:
        raise ConfigError(
            f"--fp8-param-gather cannot read --hf-checkpoint {checkpoint.hf_checkpoint}. Convert it with the convert "
            "command, and give --load."
        )


def check_lora_layers(lora: LoraConfig, parallel: ParallelConfig) -> None:
    """Refuse adapters beside weights that are kept in FP8, to which nothing can be merged."""
    if lora.wanted and parallel.fp8_param_gather:
        raise ConfigError(
            f"--lora-rank {lora.lora_rank} does not work with --fp8-param-gather, which is for weights that learn, and "
            "those beside adapters do not. Leave --fp8-param-gather out."
        )


def _check_ends(parallel: ParallelConfig, model: ModelConfig) -> None:
    plain = PrecisionConfig()
    if not parallel.first_last_layers_bf16:
        for name in _OF_ENDS:
            if getattr(parallel, name) != getattr(plain, name):
                raise ConfigError(f"{_told(parallel, name)} does nothing without --first-last-layers-bf16. Add it.")
        return
    if parallel.fp8_recipe == "delayed":
        raise ConfigError(
            "--first-last-layers-bf16 does not work with --fp8-recipe delayed, whose scales are updated for all layers "
            "at once. Use another recipe, or leave it out."
        )
    most = model.num_layers // parallel.pipeline_model_parallel_size
    for name in _OF_ENDS:
        if not 0 <= getattr(parallel, name) <= most:
            raise ConfigError(f"{_told(parallel, name)} must be from 0 to the {most} layers of a pipeline stage.")


def _check_gather(parallel: ParallelConfig) -> None:
    if not parallel.fp8_param_gather:
        return
    if not parallel.use_distributed_optimizer:
        raise ConfigError("--fp8-param-gather needs --use-distributed-optimizer. Add it, or leave the former out.")
    if parallel.fp8_recipe == "mxfp8":
        raise ConfigError("--fp8-param-gather is not supported with --fp8-recipe mxfp8. Leave it out.")


def _check_recompute(parallel: ParallelConfig) -> None:
    if parallel.fp8_recipe == "delayed" and "layernorm" in (parallel.recompute_modules or ()):
        raise ConfigError(
            "--recompute-modules layernorm does not work with --fp8-recipe delayed. Use another recipe, or leave "
            "layernorm out."
        )


def _check_widths(parallel: ParallelConfig, model: ModelConfig) -> None:
    unit = 32 if parallel.fp8_recipe == "mxfp8" else 16
    tensor = parallel.tensor_model_parallel_size
    experts = parallel.expert_tensor_parallel_size or tensor
    advice = "Use another --tensor-model-parallel-size, or leave --fp8-format out."
    check_widths(model, tensor, experts, unit, advice)


def check_widths(model: ModelConfig, tensor: int, experts: int, unit: int, advice: str) -> None:
    """Refuse weight matrices that, as a rank has them, are not multiples of `unit` on both sides.

    Args:
        tensor, experts: processes that share a layer, and an expert.
    """
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    width = model.kv_channels or model.hidden_size // heads
    widths = [
        ("--hidden-size", model.hidden_size, 1),
        ("the width of all attention heads", heads * width, tensor),
        ("the width of queries, keys and values", (heads + 2 * groups) * width, tensor),
    ]
    if model.num_experts is None or model.moe_first_k_dense:
        widths.append(("--ffn-hidden-size", model.ffn_hidden_size or 4 * model.hidden_size, tensor))
    if model.num_experts is not None and model.moe_ffn_hidden_size is not None:
        widths.append(("--moe-ffn-hidden-size", model.moe_ffn_hidden_size, experts))
    if model.moe_shared_expert_intermediate_size is not None:
        shared = model.moe_shared_expert_intermediate_size
        widths.append(("--moe-shared-expert-intermediate-size", shared, tensor))
    for name, size, parts in widths:
        if size % (unit * parts):
            among = f" over {parts} processes" if parts > 1 else ""
            raise ConfigError(f"{name} is {size}{among}, and FP8 needs multiples of {unit} on each process. {advice}")


def _told(parallel: ParallelConfig, name: str) -> str:
    value = getattr(parallel, name)
    return flag_name(name) if value is True else f"{flag_name(name)} {value}"
