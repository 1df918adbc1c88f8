"""Layers of Transformer Engine, and kernels of the loss head, as far as their memory goes: for plans, on a CPU.

Neither runs here, and tensors of a plan have no numbers anyway. So a plan builds megatron-core's plain layers, which
have the same weights, and lets their parts keep and take what those of Transformer Engine do (`fuse`, within
`standing_in`):

  products     keep their input, in FP8 where the layer has it (planning/precision.py); the output of attention, which
               attention keeps anyway, as it is (megatron-core asks for that, but under `delayed`). While they run there
               are the input by rows and by columns, what sequence parallelism gathers of it, and in the backward pass
               its gradient in FP8 by rows and by columns.
  norms        keep input and one number a line, as ours do; none is computed again under --recompute-modules layernorm
               where it is one module with a product.
  rotary       keeps the angles, which all layers share.
  gated unit   keeps its input (one kernel; not with overrides that ask for another).
  loss head    works on a tile of logits in its place (model/head_triton.py).

Nothing is computed: results have the right shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from megatron_dlm.planning.precision import BF16, Precision

_NORMS = ("recompute_input_layernorm", "recompute_pre_mlp_layernorm")


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a run on a GPU has kernels of its own for.

    Attributes: precision: of the layers. gated_unit: whether that of fused layers is one. head: of the loss.
    """

    precision: Precision = BF16
    gated_unit: bool = True
    head: bool = False


PLAIN = Kernels()


@contextlib.contextmanager
def standing_in(triton_head: bool) -> Iterator[None]:
    """Let megatron-core's fused functions, and the kernels of the loss head if they are wanted, stand for themselves.

    triton_head: whether the loss head has kernels.
    """
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import mlp

    from megatron_dlm.model import head

    plain = head._kernels
    kernels = lambda fused, weight: plain(fused, weight) if weight.dtype == torch.float64 else (_statistics, _gradient)
    with (
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", lambda x, *_, **__: _Turned.apply(x)),
        mock.patch.object(mlp, "bias_swiglu_impl", lambda x, *_: _Gated.apply(x, None)),
        mock.patch.object(mlp, "weighted_bias_swiglu_impl", lambda x, _, weight, *__: _Gated.apply(x, weight)),
        mock.patch.object(head, "_kernels", kernels if triton_head else plain),
    ):
        yield


def fuse(chunk: nn.Module, precision: Precision, gated: bool = True) -> None:
    """Let the layers of a chunk keep what those of Transformer Engine do; within `standing_in`.

    Args:
        gated: the gated unit is one kernel.
    """
    for module in chunk.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config.apply_rope_fusion, config.bias_activation_fusion = True, gated
    for layer in chunk.decoder.layers:
        for name in _NORMS if not _has_experts(layer) else _NORMS[:1]:
            setattr(layer, name, False)
        fp8 = precision.in_fp8(layer.layer_number - 1, layer.config.num_layers)
        keeps = layer.self_attention.linear_proj if precision.recipe != "delayed" else None
        for linear in linears(layer):
            linear._forward_impl = partial(_product, _How(precision if fp8 else None, linear is keeps))


def linears(layer: nn.Module) -> Iterator[nn.Module]:
    """The linear layers of a transformer layer, whose products FP8 is for."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    return (module for module in layer.modules() if isinstance(module, (ColumnParallelLinear, RowParallelLinear)))


def _has_experts(layer: nn.Module) -> bool:
    return hasattr(layer.mlp, "experts")


@dataclass(frozen=True, slots=True)
class _How:
    """precision: None for a product in the type of its factors. keeps_input: as it is, whatever the product is in."""

    precision: Precision | None
    keeps_input: bool


def _product(how: _How, input: Tensor, weight: Tensor, sequence_parallel: bool, tp_group=None, **_: object) -> Tensor:
    return _Product.apply(input, weight, how, tp_group.size() if sequence_parallel else 1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, how: _How, parts: int) -> Tensor:
        kept, there = x, []
        if how.precision is not None:
            kept = _bytes(x, how.precision.input_bytes(x.numel() // x.shape[-1], x.shape[-1]))
            there.append(_bytes(x, x.numel()))  # by rows
        if parts > 1:  # what all ranks have of it
            there.append(_bytes(x, parts * x.numel() * (x.itemsize if how.precision is None else 1)))
        out = x.new_empty(parts * x.shape[0], *x.shape[1:-1], weight.shape[0])
        if weight.requires_grad:
            ctx.save_for_backward(x if how.keeps_input else kept)
        ctx.rest = x.shape, weight.shape, how, parts
        there.clear()  # is there until here
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, wide, how, parts = ctx.rest
        size, fp8 = shape.numel(), how.precision is not None
        there = [_bytes(grad, 2 * grad.numel())] if fp8 else []
        if ctx.saved_tensors and (parts > 1 or (fp8 and how.keeps_input)):
            there.append(_bytes(grad, parts * size * (1 if fp8 else grad.itemsize)))
        by_input = grad.new_empty(parts * shape[0], *shape[1:])
        if parts > 1:
            by_input = grad.new_empty(shape)
        by_weight = grad.new_empty(wide) if ctx.needs_input_grad[1] else None
        there.clear()
        return by_input, by_weight, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(*([x] if weight is None else [x, weight]))
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, *weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight[0]) if weight else None


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def _bytes(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def _statistics(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty((4, len(logits)), dtype=torch.float32)


def _gradient(logits: Tensor, *_: object) -> Tensor:
    return logits
