"""What the engine cannot have: layouts of its own that do not come out even.

Pure functions, like those in `validate`.
"""

from __future__ import annotations

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import one_of
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import LayoutConfig
from megatron_dlm.config.rollout import CapacityConfig, EngineConfig
from megatron_dlm.config.validate import above, at_least, check_tensor_size, within
from megatron_dlm.config.validate_fp8 import check_widths

TENSOR, EXPERTS = "--rollout-tensor-model-parallel-size", "--rollout-expert-model-parallel-size"
WEIGHTS = "--rollout-weights"


def check_capacity(settings: CapacityConfig) -> None:
    """Refuse what no engine can work with."""
    within(settings, 1, 2**16, "max_running_requests")
    at_least(settings, 1, "max_tokens_per_pass", "kv_page_size", "rollout_rounds_per_sync")
    above(settings, 0, "kv_cache_gib")
    within(settings, 0, 1, "kv_cache_memory_fraction", low_open=True)
    if settings.rollout_cuda_graphs and settings.rollout_attention_backend != "flash":
        raise ConfigError(
            "--rollout-cuda-graphs needs --rollout-attention-backend flash, because other backends plan each pass on "
            f"the host, and it is {settings.rollout_attention_backend}. Set it, or leave --rollout-cuda-graphs out."
        )


def check_rollout_layout(
    parallel: LayoutConfig, model: ModelConfig, engine: EngineConfig | None = None, world_size: int = 1
) -> None:
    """Refuse a split that the rollout engine cannot have.

    Args:
        parallel: has been checked.
        model: resolved.
        engine: None for a command whose engine has the layout of `parallel`.
        world_size: processes of the job.
    """
    own = engine or EngineConfig()
    at_least(own, 1, "rollout_tensor_model_parallel_size", "rollout_expert_model_parallel_size", "refit_bucket_mib")
    size = own.rollout_tensor_model_parallel_size
    if size is not None:
        if world_size % size:
            raise ConfigError(
                f"{world_size} processes cannot be split into rollout models of {TENSOR} {size}. "
                f"Use {_divisors(world_size)}."
            )
        check_tensor_size(size, model, TENSOR)
    _check_query_groups(parallel, model, engine)
    _check_experts(parallel, model, engine, world_size)
    check_rollout_weights(own, parallel, model)


def check_rollout_weights(engine: CapacityConfig, parallel: LayoutConfig, model: ModelConfig) -> None:
    """Refuse weights in FP8 that an engine cannot have.

    Args:
        engine: where it is no EngineConfig, its layout is that of `parallel`.
    """
    if engine.rollout_weights != "fp8":
        return
    own = engine if isinstance(engine, EngineConfig) else EngineConfig()
    if own.rollout_backend != "native":
        raise ConfigError(
            f"{WEIGHTS} fp8 does not work with --rollout-backend {own.rollout_backend}. Leave it out, or use native."
        )
    if not model.bf16:
        raise ConfigError(f"{WEIGHTS} fp8 needs --bf16, the type of its products. Add it, or use {WEIGHTS} trained.")
    tensor = own.rollout_tensor_model_parallel_size or parallel.tensor_model_parallel_size
    experts = own.rollout_expert_model_parallel_size or parallel.expert_model_parallel_size
    flag = TENSOR if isinstance(engine, EngineConfig) else "--tensor-model-parallel-size"
    advice = f"Use another {flag}, or {WEIGHTS} trained."
    check_widths(model, tensor, _processes_per_expert(parallel, tensor, experts), 16, advice)


def _check_query_groups(parallel: LayoutConfig, model: ModelConfig, engine: EngineConfig | None) -> None:
    """Training may keep a group on several processes, the engine's cache may not."""
    given = engine.rollout_tensor_model_parallel_size if engine is not None else None
    size, groups = given or parallel.tensor_model_parallel_size, model.num_query_groups
    if groups % size:
        fitting = one_of([n for n in range(1, groups + 1) if groups % n == 0])
        can_differ = engine is not None and given is None
        raise ConfigError(
            f"{TENSOR if given else '--tensor-model-parallel-size'} {size} does not divide the {groups} query groups "
            "of this model, which generation needs. "
            + (f"Use {fitting}, or give that as {TENSOR}." if can_differ else f"Use {fitting}.")
        )


def _check_experts(parallel: LayoutConfig, model: ModelConfig, engine: EngineConfig | None, world_size: int) -> None:
    """Engines that share experts make their passes together: an engine cannot belong to two such groups."""
    given = engine.rollout_expert_model_parallel_size if engine is not None else None
    if model.num_experts is None:
        if given is not None and given > 1:
            raise ConfigError(f"{EXPERTS} {given} needs a model with experts. Use 1, or give --num-experts.")
        return
    served = engine is not None and engine.rollout_backend != "native"  # another program lays them out
    tensor = (engine.rollout_tensor_model_parallel_size if engine else None) or parallel.tensor_model_parallel_size
    size = 1 if served else given or parallel.expert_model_parallel_size
    shard = _processes_per_expert(parallel, tensor, size)
    if engine is not None:
        _check_expert_group(model, size, shard, world_size, EXPERTS if given else "--expert-model-parallel-size")
    width = model.moe_ffn_hidden_size
    if width is not None and width % shard:
        flag = TENSOR if engine is not None else "--tensor-model-parallel-size"
        raise ConfigError(
            f"Experts of width {width} (--moe-ffn-hidden-size) do not split over the {shard} tensor-parallel processes "
            f"of the engine. Give a {flag} that divides the width."
        )
    if size > 1 and (size * shard) % tensor and tensor % (size * shard):
        flag = TENSOR if engine is not None else "--tensor-model-parallel-size"
        raise ConfigError(
            f"{flag} {tensor} does not go with experts that {size} x {shard} processes share: some engines would stand "
            f"in two groups of them. Make one of {tensor} and {size * shard} a multiple of the other"
            + (f", or use {EXPERTS} 1." if engine is not None else ".")
        )


def _processes_per_expert(parallel: LayoutConfig, tensor: int, size: int) -> int:
    """Over how many processes an engine splits each expert (parallel.groups.rollout_groups decides the same).

    Args:
        tensor, size: tensor- and expert-parallel size of the engine.
    """
    if size == 1:
        return tensor
    if size != parallel.expert_model_parallel_size:
        return 1
    given = parallel.expert_tensor_parallel_size
    return parallel.tensor_model_parallel_size if given is None else given


def _check_expert_group(model: ModelConfig, size: int, shard: int, world_size: int, flag: str) -> None:
    if model.num_experts % size:
        raise ConfigError(
            f"{flag} {size} does not divide the {model.num_experts} experts of this model. "
            f"Use {_divisors(model.num_experts)}."
        )
    if size > 1 and world_size % (size * shard):
        raise ConfigError(
            f"{world_size} processes cannot be split into engines that share experts over {flag} {size} x {shard} "
            f"processes per expert. Start a multiple of {size * shard}, or use {EXPERTS} 1."
        )


def _divisors(number: int) -> str:
    return one_of([n for n in range(1, number + 1) if number % n == 0][:12])
