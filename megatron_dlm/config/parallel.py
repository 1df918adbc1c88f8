"""How one model is spread over processes. Data parallelism is what is left of the world size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
RECOMPUTE_MODULES: tuple[str, ...] = get_args(RecomputeModule)
"""Parts of a layer that can be computed again in the backward pass, by megatron-core's names."""


_FP8_TOKENS = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def fp8_tokens(fp8_format: str | None, recipe: str) -> int:
    """Numbers of tokens that the matrix products of an FP8 recipe take are multiples of this: 16 bytes, or the blocks
    that have a scale of their own; 1 without FP8.
    """
    return 1 if fp8_format is None else _FP8_TOKENS[recipe]


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
class RowsConfig(LayoutConfig):
    """How a model that goes over packed rows is spread over processes, and by which means it does."""

    attention_backend: Literal["auto", "dense", "flex"] = "auto"
    """What computes attention over packed rows: torch's own under a mask for each group (dense), or FlexAttention,
    which computes no tile of a row that nobody sees (flex). auto is flex on a GPU where it can serve the model and
    computes what dense does on a small row, which is tried at the start, and dense elsewhere. Rollouts have
    --rollout-attention-backend."""
    loss_head: Literal["auto", "torch", "triton"] = "auto"
    """What works on the logits of targets: torch's operations, or kernels in Triton, which read them once. auto is
    triton on a GPU where it computes what torch does on a few targets, which is tried at the start, and torch
    elsewhere."""


@dataclass(slots=True)
class PrecisionConfig(RowsConfig):
    """How a model that is trained is spread over processes, and what its layers compute in."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Whose linear layers, norms and experts the trained models have: megatron-core's plain ones, or those of
    Transformer Engine, which need a GPU. Checkpoints are the same; rollouts always run on the plain ones."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply the matrices of the layers in FP8: e4m3 everywhere, or e5m2 for gradients (hybrid). It needs
    --transformer-impl transformer_engine and --bf16. Norms, attention and heads stay in bfloat16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How tensors are scaled for FP8: one number from earlier steps (delayed), one from the tensor itself (tensorwise),
    one for each block of a tensor (blockwise; mxfp8 on Blackwell GPUs)."""
    fp8_param_gather: bool = False
    """Keep the weights of the layers in FP8 and gather them so over the data-parallel processes; the optimizer has
    exact ones. It needs --use-distributed-optimizer."""
    fp8_margin: int = 0
    """With delayed: leave this many powers of two between a tensor's largest number and that of FP8."""
    fp8_amax_history_len: int = 1
    """With delayed: number of steps whose largest numbers are remembered."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """With delayed: scale by the last of the remembered numbers, or by the largest."""
    first_last_layers_bf16: bool = False
    """Compute the first and the last layers in bfloat16, the others in FP8. Not with delayed."""
    num_layers_at_start_in_bf16: int = 1
    """With --first-last-layers-bf16: number of layers at the start."""
    num_layers_at_end_in_bf16: int = 1
    """With --first-last-layers-bf16: number of layers at the end."""

    @property
    def token_multiple(self) -> int:
        """Tokens that a process has of a row are a multiple of this."""
        return fp8_tokens(self.fp8_format, self.fp8_recipe)


@dataclass(slots=True)
class ParallelConfig(PrecisionConfig):
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


def for_rollouts(layout: LayoutConfig) -> ParallelConfig:
    """That of a command whose models go over no packed rows: nothing is tried out for these."""
    return ParallelConfig(**dataclasses.asdict(layout), attention_backend="dense", loss_head="torch")


def without_recompute(parallel: ParallelConfig) -> ParallelConfig:
    """The same for a model that is never trained, which has nothing to compute again."""
    return dataclasses.replace(
        parallel, recompute_granularity=None, recompute_method=None, recompute_num_layers=None, recompute_modules=None
    )


def with_local_layers(parallel: ParallelConfig) -> ParallelConfig:
    """The same with megatron-core's plain layers in full precision: what the engine of rollouts runs on."""
    names = [field.name for field in dataclasses.fields(PrecisionConfig)]
    inherited = {field.name for field in dataclasses.fields(RowsConfig)}
    plain = PrecisionConfig()
    return dataclasses.replace(parallel, **{name: getattr(plain, name) for name in names if name not in inherited})
