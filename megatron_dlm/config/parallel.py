"""How one model is spread over processes. Data parallelism is what is left of the world size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
RECOMPUTE_MODULES: tuple[str, ...] = get_args(RecomputeModule)
"""Parts of a layer that can be computed again in the backward pass, by megatron-core's names."""


@dataclass(slots=True)
class LayoutConfig:
    """How the model is spread over processes."""

    tensor_model_parallel_size: int = 1
    """Number of processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages, each with an equal share of the layers."""
    expert_model_parallel_size: int = 1
    """Number of processes that share the experts of a mixture-of-experts layer."""
    expert_tensor_parallel_size: int | None = None
    """Number of processes that share each expert; the tensor-parallel size when it is not given."""
    sequence_parallel: bool = False
    """Split the activations between layers over the tensor-parallel processes, along the sequence."""
    distributed_timeout_minutes: int = 10
    """Give up on a collective operation after this many minutes."""
    host_timeout_seconds: float = 120.0
    """Give up when another host of the job has not been heard of for this many seconds; 0: never, collective operations
    then wait for it as long as they do. Each host looks five times within it."""


@dataclass(slots=True)
class ParallelConfig(LayoutConfig):
    """How a model that is trained is spread over processes."""

    context_parallel_size: int = 1
    """Number of processes that share each row: every one has noisy copies of its own, and they exchange the keys and
    values of the clean text."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Cut each pipeline stage into this many parts and interleave them, which shortens the pipeline's idle time. It
    needs 2 pipeline stages or more."""
    use_distributed_optimizer: bool = False
    """Split the optimizer state over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs."""
    loss_chunk_size: int = 512
    """Number of targets whose logits are in memory at the same time in the loss, whose backward pass computes them
    again. 0 computes them once and keeps those of all targets of a row."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Save activation memory by computing again in the backward pass: parts of each layer (selective), or whole layers
    (full). The value model does as the policy."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: keep the input of every --recompute-num-layers layers only (uniform), or compute that many layers of
    each pipeline stage again and the others not (block)."""
    recompute_num_layers: int | None = None
    """With full: the number of layers that --recompute-method speaks of."""
    recompute_modules: list[RecomputeModule] | None = None
    """With selective: the parts of a layer that are computed again; the core attention when they are not given."""


def without_recompute(parallel: ParallelConfig) -> ParallelConfig:
    """The same for a model that is never trained, which has nothing to compute again."""
    return dataclasses.replace(
        parallel, recompute_granularity=None, recompute_method=None, recompute_num_layers=None, recompute_modules=None
    )
