"""How one model is spread over processes. Data parallelism is what is left of the world size."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(slots=True)
class ParallelConfig(LayoutConfig):
    """How a model that is trained is spread over processes."""

    use_distributed_optimizer: bool = False
    """Split the optimizer state over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs."""
