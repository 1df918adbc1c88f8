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

TENSOR, EXPERTS = "--rollout-tensor-model-parallel-size", "--rollout-expert-model-parallel-size"


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
    _check_experts(parallel, model, engine)


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


def _check_experts(parallel: LayoutConfig, model: ModelConfig, engine: EngineConfig | None) -> None:
    given = engine.rollout_expert_model_parallel_size if engine is not None else None
    if given is not None and given > 1 and model.num_experts is None:
        raise ConfigError(f"{EXPERTS} {given} needs a model with experts. Use 1, or give --num-experts.")
    if given is not None and given > 1:
        raise ConfigError(
            f"{EXPERTS} {given} does not work with generation yet. Use 1, and split experts with {TENSOR}."
        )
    served = engine is not None and engine.rollout_backend != "native"  # another program lays them out
    if parallel.expert_model_parallel_size > 1 and given is None and not served:
        raise ConfigError(
            f"--expert-model-parallel-size {parallel.expert_model_parallel_size} does not work with generation yet. "
            + (
                "Use 1, and split experts with --tensor-model-parallel-size."
                if engine is None
                else f"Add {EXPERTS} 1, so that each engine has all experts."
            )
        )
    size = (engine.rollout_tensor_model_parallel_size if engine else None) or parallel.tensor_model_parallel_size
    width = model.moe_ffn_hidden_size
    if model.num_experts is not None and width is not None and width % size:
        flag = TENSOR if engine is not None else "--tensor-model-parallel-size"
        raise ConfigError(
            f"Experts of width {width} (--moe-ffn-hidden-size) do not split over the {size} tensor-parallel processes "
            f"of the engine. Give a {flag} that divides the width."
        )


def _divisors(number: int) -> str:
    return one_of([n for n in range(1, number + 1) if number % n == 0][:12])
