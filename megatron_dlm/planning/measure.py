"""What one rank of a job holds, found out by building it: models, buffers, optimizers and one row's forward and
backward pass, over tensors without data.

Everything runs within `world.as_rank`. What is real: the model, its pipeline chunks, DDP's buffers with their padding,
the optimizer and its shard, recomputation, collectives' buffers, the loss. What stands in: attention
(planning/attention.py), what a GPU alone can run (planning/fused.py), and the routing of experts, which is taken to be
even.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from megatron_dlm import platform
from megatron_dlm.diffusion.layout import Layout
from megatron_dlm.diffusion.rows import Row, Targets
from megatron_dlm.model.row_params import RowParams
from megatron_dlm.planning.attention import PlannedAttention
from megatron_dlm.planning.fused import PLAIN, Kernels, fuse, linears, standing_in
from megatron_dlm.planning.live import LiveBytes, SavedBytes
from megatron_dlm.planning.precision import Precision
from megatron_dlm.training import sleep
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import ForwardStep


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Of one model on one rank. `optimizer`: master weights and moments; `moments` of it are taken at the first
    update. `count`: parameters. `copies`: of weights in FP8, beside those in bfloat16.
    """

    count: int
    parameters: int
    gradients: int
    optimizer: int
    moments: int
    copies: int = 0

    @property
    def training(self) -> int:
        """What sleeps: gradients and optimizer; copies of weights are made again when they are needed."""
        return self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Of one row on one rank.

    Attributes:
        saved: distinct storages that one microbatch keeps for its backward pass, chunk by chunk.
        peak: the most that is there at a time in forward and backward of one microbatch, the saved ones included.
        head: the most that the head and the loss take of it, forward and backward.
        shared: buffers that are kept between microbatches, however many there are.
        boundary: the tensor that a pipeline stage receives, of each microbatch.
    """

    saved: tuple[int, ...]
    peak: int
    head: int
    shared: int
    boundary: int


@dataclass(frozen=True, slots=True)
class RowShape:
    """A planned row. `tokens`: on this rank, tensor-parallel ranks together. `targets`: read by the head."""

    tokens: int
    targets: int


def state_bytes(state: TrainState) -> StateBytes:
    """A storage counts once: as parameters before optimizer."""
    seen: set[int] = set()
    parameters = distinct_bytes(sleep.parameter_tensors(state), seen)
    gradients = distinct_bytes(sleep.gradient_tensors(state), seen)
    held = distinct_bytes(sleep.optimizer_tensors(state), seen)
    moments = sleep.state_to_come(state)
    count = sum(parameter.numel() for _, parameter in state.named_parameters())
    return StateBytes(count, parameters, gradients, held + moments, moments)


def weights_in_fp8(state: TrainState, precision: Precision) -> list[nn.Parameter]:
    """Weights whose products are computed in FP8."""
    return [
        linear.weight
        for chunk in state.unwrapped_chunks()
        for layer in chunk.decoder.layers
        if precision.in_fp8(layer.layer_number - 1, layer.config.num_layers)
        for linear in linears(layer)
    ]


def with_fp8(found: StateBytes, state: TrainState, precision: Precision, learns: bool) -> StateBytes:
    """The same with its weights in FP8: beside those in bfloat16, or in their place (--fp8-param-gather)."""
    weights = weights_in_fp8(state, precision)
    if precision.gather:  # both copies are made with the model, whether it learns or not
        held = sum(precision.weight_bytes(*weight.shape) for weight in weights)
        return replace(found, parameters=found.parameters + held - sum(weight.nbytes for weight in weights))
    return replace(found, copies=sum(precision.weight_bytes(*weight.shape, learns) for weight in weights))


def distinct_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages under some tensors that are not in `seen` yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def activation_bytes(
    state: TrainState,
    shape: RowShape,
    attention: PlannedAttention,
    forward: ForwardStep,
    kernels: Kernels = PLAIN,
) -> ActivationBytes:
    """Forward and backward of one row through this rank's chunks.

    Args:
        forward: of training/step.py, for a plain row.
        kernels: that a GPU has for the layers and the loss head.
    """
    from megatron.core.parallel_state import get_global_memory_buffer

    row = planned_row(shape, platform.device())
    with standing_in(kernels.head):
        for chunk in state.unwrapped_chunks() if kernels.precision.fused else ():
            fuse(chunk, kernels.precision, kernels.gated_unit)
        found = [_one_chunk(state, wrapped, row, attention, forward) for wrapped in state.chunks]
    buffers = get_global_memory_buffer().buffer.values()
    return ActivationBytes(
        saved=tuple(one.saved for one in found),
        peak=max(one.peak for one in found),
        head=max(one.head for one in found),
        shared=distinct_bytes((tensor for tensor in buffers if tensor is not None), set()),
        boundary=sum(one.boundary for one in found),
    )


@dataclass(slots=True)
class _Chunk:
    saved: int = 0
    peak: int = 0
    head: int = 0
    boundary: int = 0


def _one_chunk(state: TrainState, wrapped, row: Row, attention: PlannedAttention, forward: ForwardStep) -> _Chunk:
    chunk, found = wrapped.module, _Chunk()
    _balance_experts(chunk)
    if wrapped.ddp_config.overlap_param_gather:
        wrapped.disable_forward_pre_hook(param_sync=False)
    wrapped.train()
    # What the row brings, and what the stage before sent, is there whatever number of layers looks at it.
    besides = [*chunk.parameters(), *tensors_of(row)]
    if not chunk.pre_process:
        received = _received(state, len(row.tokens))
        found.boundary = received.untyped_storage().nbytes()
        chunk.set_input_tensor([received])
        besides.append(received)
    keeps = SavedBytes(besides)
    # Gradients are reduced at the end of an update, in place; what is measured here is a row before it.
    with wrapped.no_sync(), LiveBytes() as live:
        with keeps.counting():
            output, loss_fn = forward(row, _Planned(chunk, attention))
        gradient = None
        if chunk.post_process:
            before, live.peak = live.now, live.now
            seen = output.detach().requires_grad_(True)
            with keeps.counting():
                loss = loss_fn(seen)[0]
            found.saved = keeps.total()
            loss.backward()
            found.head, gradient = live.peak - before, seen.grad
            del seen, loss
        found.saved = found.saved or keeps.total()
        if output.requires_grad:
            output.backward(torch.empty_like(output) if gradient is None else gradient)
        found.peak = live.peak
        del output, loss_fn, gradient
    for parameter in chunk.parameters():
        parameter.grad = None
    return found


def _received(state: TrainState, tokens: int) -> Tensor:
    """What the stage before sends."""
    config = state.config
    here = tokens // (state.groups.tp_size if config.sequence_parallel else 1)
    dtype = config.pipeline_dtype or config.params_dtype
    return torch.empty(here, 1, config.hidden_size, dtype=dtype, device=platform.device()).requires_grad_(True)


def planned_row(shape: RowShape, device: torch.device) -> Row:
    """A row of the right sizes; nobody reads its numbers."""
    whole = lambda *size: torch.zeros(*size, dtype=torch.int64, device=device)
    layout = Layout(*(torch.zeros(shape.tokens, dtype=torch.int32, device=device) for _ in range(5)))
    count = shape.targets
    weight = torch.zeros(count, dtype=torch.float64, device=device)
    return Row(whole(shape.tokens), layout, Targets(whole(count), whole(count), weight, whole(count), whole(count)))


def tensors_of(row: Row) -> list[Tensor]:
    layout, targets = row.layout, row.targets
    of_layout = [layout.group, layout.response, layout.view, layout.block, layout.position]
    return [row.tokens, *of_layout, targets.slot, targets.label, targets.weight]


class _Planned:
    """Stands where a step function expects a wrapped chunk: rows go through the chunk with the planned attention."""

    def __init__(self, chunk: nn.Module, attention: PlannedAttention) -> None:
        self.module, self.chunk, self.attention = self, chunk, attention

    def __getattr__(self, name: str):
        return getattr(self.chunk, name)

    def forward_row(self, row: Row, headless: bool = False) -> Tensor:
        params = RowParams(
            position=row.layout.position, slots=row.targets.slot, attention=self.attention, headless=headless
        )
        return self.chunk.forward_tokens(row.tokens, params)


def _balance_experts(chunk: nn.Module) -> None:
    """Let every expert get as many tokens as any other. Sizes that depend on the router's choice would not be known."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    for module in chunk.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        if isinstance(dispatcher, MoEAlltoAllTokenDispatcher) and not isinstance(
            getattr(dispatcher, "preprocess", None), _Even
        ):
            dispatcher.drop_and_pad, dispatcher.moe_expert_capacity_factor = True, 1.0
            dispatcher.preprocess = _Even(dispatcher)


class _Even:
    """The dispatcher's `preprocess`, whose answer is the same for each expert."""

    def __init__(self, dispatcher) -> None:
        self.dispatcher = dispatcher

    def __call__(self, routing_map: Tensor):
        one = self.dispatcher
        one.capacity = -(-routing_map.shape[0] * one.config.moe_router_topk // one.num_experts)
        one.num_out_tokens = one.capacity * one.num_experts
        each = one.capacity * one.tp_size * one.ep_size
        return SimpleNamespace(tolist=lambda: [each] * one.num_local_experts)
