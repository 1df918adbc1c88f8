"""One trainable model: its parameters, gradients, optimizer and schedule, in one process layout.

A process may hold several (policy, value, reference). Each owns its TransformerConfig, because megatron-core's
schedules hang hooks on it: a config must not be shared between two states. A state without an optimizer still gathers
gradients (tests, analysis); one whose parameters are all frozen allocates no gradients (reference models).

The scale of the gradient is decided here once: `calculate_per_token_loss` makes megatron-core sum over microbatches and
data-parallel ranks, and our `finalize` hook leaves its division by a token count out. So the gradient is that of the
plain sum of all losses: rows carry final weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from megatron_dlm import platform
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.model.lora import Adapter, adapted_layers
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.training.host_optimizer import MASTER
from megatron_dlm.training.optimizer import build_optimizer, build_scheduler

if TYPE_CHECKING:
    from megatron_dlm.training.sleep import Sleep

ModelBuilder = Callable[[bool, bool, "int | None"], nn.Module]
"""(pre_process, post_process, vp_stage) -> one chunk of a megatron-core model, built with the state's own
TransformerConfig.
"""

_LAYER = re.compile(r"^(.*\blayers\.)(\d+)$")


@dataclass(slots=True)
class TrainState:
    """One trainable model. `chunks` are wrapped for data parallelism, one per virtual pipeline stage; `iteration`
    counts finished updates; `sleep` is what the state has given back, if it ever slept (training/sleep.py).
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer | None
    scheduler: OptimizerParamScheduler | None
    config: TransformerConfig
    groups: Groups
    iteration: int = 0
    sleep: Sleep | None = None

    @classmethod
    def build(
        cls,
        model_builder: ModelBuilder,
        transformer_config: TransformerConfig,
        optimizer_config: OptimizerConfig | None,
        parallel_config: ParallelConfig,
        groups: Groups,
        train_iters: int,
    ) -> TrainState:
        """Build this rank's chunks, wrap them, and make the optimizer and its schedule. Collective.

        Args:
            model_builder: makes one chunk; its `.config` must be `transformer_config` itself.
            transformer_config: owned by the state from here on.
            optimizer_config: None for a model that is never updated.
            train_iters: updates in the whole run; the length of the learning-rate schedule unless `lr_decay_iters` says
                otherwise.

        Raises:
            ConfigError: the warm-up or the end of the schedule does not fit into it; a distributed optimizer other than
                Adam.
        """
        _prepare_config(transformer_config, groups)
        with platform.cuda_calls_on_cpu():
            modules = _build_modules(model_builder, transformer_config, groups)
            chunks = _wrap(modules, transformer_config, parallel_config, groups)
            optimizer = scheduler = None
            if optimizer_config is not None:
                optimizer = build_optimizer(chunks, transformer_config, optimizer_config, parallel_config, groups)
                scheduler = build_scheduler(optimizer, optimizer_config, train_iters)
        _hang_hooks(transformer_config, chunks, optimizer, parallel_config)
        return cls(chunks, optimizer, scheduler, transformer_config, groups)

    @property
    def module(self) -> nn.Module:
        """The first chunk, without its data-parallel wrapper: its only one without virtual pipeline stages."""
        return self.chunks[0].module

    def unwrapped_chunks(self) -> list[nn.Module]:
        return [chunk.module for chunk in self.chunks]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, with the names that they have in a model without pipeline parallelism."""
        for chunk in self.unwrapped_chunks():
            rename = global_names(chunk)
            for name, parameter in chunk.named_parameters():
                yield rename(name), parameter

    def gather_parameters(self) -> None:
        """Bring every parameter up to date on this rank. Collective over the data-parallel ranks.

        With `overlap_param_gather` an update leaves each rank with its own shard only, until the next forward pass
        gathers the rest. Whoever reads weights otherwise (a checkpoint, refit, an engine bound to this storage) calls
        this first. Without overlap there is nothing to do.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                gather_now(chunk)

    def learning_rate(self) -> float:
        """The rate that the next update will use."""
        return 0.0 if self.optimizer is None else self.optimizer.param_groups[0]["lr"]


def gather_now(chunk: DistributedDataParallel) -> None:
    """Gather the parameters of a chunk from the ranks whose optimizers moved them. Collective over data ranks.

    Weights in FP8 may come with a transposed copy, which the backward pass reads. Since Transformer Engine 2.10
    megatron-core renews it where a forward pass waits for a gather; none will wait for this one.
    """
    chunk.start_param_sync(force_sync=True)
    post_all_gather_processing([parameter for parameter in chunk.parameters() if is_float8tensor(parameter)])


def forget_optimizer(state: TrainState) -> None:
    """Begin anew with the optimizer: no moments, no count of steps, and master weights with no more precision than the
    model has. The schedule stays where it is. The state must not sleep.
    """
    optimizer = state.optimizer
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.optimizer is None:  # a rank may have no parameter for one of them
            continue
        for kept in one.optimizer.state.values():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor) and name != MASTER:
                    value.zero_()
        for group in one.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0
        one.reload_model_params()


def global_names(chunk: nn.Module) -> Callable[[str], str]:
    """A function from names within a pipeline chunk to names within the whole model.

    Pipeline stages number their layers from 0 each; a megatron-core layer knows its place in the model as
    `layer_number`, from 1.
    """
    prefixes = {}
    for name, module in chunk.named_modules():
        match = _LAYER.match(name)
        if match and hasattr(module, "layer_number"):
            prefixes[name] = f"{match[1]}{module.layer_number - 1}"

    def rename(name: str) -> str:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            prefix = ".".join(parts[:length])
            if prefix in prefixes:
                return prefixes[prefix] + name[len(prefix) :]
        return name

    return rename


def adapters_by_weight(state: TrainState) -> dict[str, Adapter]:
    """The low-rank adapters of this rank, by the names in the whole model of the weights that they stand beside."""
    found = {}
    for chunk in state.unwrapped_chunks():
        rename = global_names(chunk)
        found |= {rename(name): layer.lora for name, layer in adapted_layers(chunk)}
    return found


def _prepare_config(config: TransformerConfig, groups: Groups) -> None:
    if config.finalize_model_grads_func is not None:
        raise ValueError("this TransformerConfig already belongs to a TrainState; make one for each model")
    config.calculate_per_token_loss = True
    if groups.pp_size > 1:
        config.pipeline_dtype = config.pipeline_dtype or config.params_dtype
        config.deallocate_pipeline_outputs = True
    if config.virtual_pipeline_model_parallel_size is not None:
        # Otherwise two stages send each other an activation and a gradient in one batch, and take one for the other.
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        # What is still being sent is given back: NCCL keeps its memory until then, gloo sends what is there afterwards.
        config.deallocate_pipeline_outputs = platform.is_cuda()


def _build_modules(builder: ModelBuilder, config: TransformerConfig, groups: Groups) -> list[nn.Module]:
    stages = config.virtual_pipeline_model_parallel_size
    modules = []
    for stage in range(stages or 1):
        first = groups.is_pipeline_first and stage == 0
        last = groups.is_pipeline_last and stage == (stages or 1) - 1
        module = builder(first, last, None if stages is None else stage)
        if module.config is not config:
            raise ValueError("model_builder must build with the very TransformerConfig that the TrainState is given")
        if platform.is_cuda():
            module.cuda(platform.device())
        for part in module.modules():
            if isinstance(part, TopKRouter):
                part.calculate_per_token_loss = (
                    False  # training/step.py makes its auxiliary losses the mean over the rows of an update
                )
        for parameter in module.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        modules.append(module)
    return modules


def _wrap(
    modules: list[nn.Module], config: TransformerConfig, parallel: ParallelConfig, groups: Groups
) -> list[DistributedDataParallel]:
    return [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.params_dtype in (torch.bfloat16, torch.float16),
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                fp8_param_gather=config.fp8_param,
            ),
            module,
            disable_bucketing=index > 0,
            pg_collection=groups.pg_collection,
        )
        for index, module in enumerate(modules)
    ]


def _hang_hooks(
    config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer | None,
    parallel: ParallelConfig,
) -> None:
    """What megatron-core's schedules read from the config while they run."""

    def one_or_all(hooks: list) -> Any:
        return hooks[0] if len(hooks) == 1 else hooks

    def finalize(model: list[nn.Module], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
        finalize_model_grads(model, None, **options)  # weights are final: nothing is divided by num_tokens

    config.finalize_model_grads_func = finalize
    if optimizer is not None:
        config.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
        if len(chunks) > 1:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if parallel.overlap_param_gather and len(chunks) > 1:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
