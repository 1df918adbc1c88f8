"""Weights in FP8 for generation: one byte for each number, and one scale for each output.

A pass that decodes few tokens waits for the bytes of the weights, and these are half of those of bfloat16. Of a linear
layer y = W x the engine keeps W as e4m3 numbers and an fp32 scale per row; x is rounded likewise, token by token, when
it comes. What is computed, on every device, is the product of the rounded numbers, summed in fp32:

    y[t, o] = x_scale[t] * w_scale[o] * sum_i x8[t, i] * w8[o, i]

On a GPU that is `torch._scaled_mm` with row-wise scales, on a CPU the sum as it stands there.

The layers are megatron-core's own, which keep splitting, communication and biases to themselves; only the product in
their middle (`_forward_impl`) is another one. So what tensor-parallel ranks sum of a layer that is cut along its inputs
are products, each with scales of its own. Such a layer is for reading alone: it has no gradient, and its weight is
written by `load`.

Invariants (tests/model/test_fp8.py): each number is the nearest e4m3 number under its row's scale, whose largest is the
largest of the format; a product is that of the dequantised numbers, and what `torch._scaled_mm` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn

from megatron_dlm import platform
from megatron_dlm.platform import kernels

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
_SMALLEST_STEP = 2.0**-9  # between e4m3 numbers, next to 0
_OF_NOTHING = 1e-30  # stands for the largest of a row of zeros
_ELEMENTS_AT_ONCE = 2**24

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]
"""[R, K] -> e4m3 [R, K] and scales, fp32 [R, 1]."""


def quantise_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """[R, K] -> e4m3 [R, K] and scales, fp32 [R, 1]: about data * scale. The largest of a row becomes 448, and rounding
    takes nothing beyond.
    """
    wide = wide.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=_OF_NOTHING) / LARGEST
    return (wide / scale).to(FP8), scale


def rounding() -> Rounding:
    """`quantise_rows` for activations: by torch, or one kernel on a GPU that has Triton."""
    if not platform.is_cuda() or kernels.missing() is not None:
        return quantise_rows
    from megatron_dlm.model import fp8_triton

    return fp8_triton.quantise_rows


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Data and scales of x [T, K], and of a weight [N, K] -> x W^T, [T, N]. On a GPU K and N are multiples of 16 and
    `dtype` is bfloat16.

    Without fast accumulation: a Hopper's tensor cores keep about 22 bits of a sum, and what that loses grows with K;
    so partial sums are added up in fp32 outside of them. Passes that wait for the bytes of weights should hardly feel
    it.
    """
    if not len(x):  # an expert whom no token chose
        return x.new_empty(0, len(weight), dtype=dtype)
    if x.is_cuda:
        return torch._scaled_mm(x, weight.t(), x_scale, weight_scale.t(), out_dtype=dtype, use_fast_accum=False)
    return (x.float() @ weight.float().t() * x_scale * weight_scale.t()).to(dtype)


def hold_in_fp8(model: nn.Module, by: Rounding | None = None) -> None:
    """Make the linear layers within the transformer layers of a model keep FP8, in storage that holds nothing yet:
    attention's, the feed-forward part's, those of all experts. Embedding, head, norms and routers stay what they are.

    Args:
        by: what rounds activations; `rounding()` if it is not given.
    """
    by = by or rounding()
    for block in model.modules():
        if isinstance(block, BaseTransformerLayer):
            for layer in block.modules():
                if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
                    _hold(layer, by)


def fp8_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that `hold_in_fp8` has changed, with the names of their weights in the model."""
    for name, layer in model.named_modules():
        if "weight_scale" in layer._buffers:
            yield f"{name}.weight", layer


def give_storage(layer: nn.Module, device: torch.device) -> None:
    """Storage for what stands on the meta device."""
    if layer.weight.is_meta:
        layer.weight = nn.Parameter(torch.empty_like(layer.weight, device=device), requires_grad=False)
    if layer.weight_scale.is_meta:
        layer.weight_scale = torch.empty_like(layer.weight_scale, device=device)


@torch.no_grad()
def load(layer: nn.Module, wide: Tensor) -> None:
    """Give a layer this weight, rounded. It passes in parts, so that little memory is needed beside."""
    for rows in _parts(wide):
        data, scale = quantise_rows(wide[rows])
        layer.weight[rows].copy_(data)
        layer.weight_scale[rows].copy_(scale)


@torch.no_grad()
def holds(layer: nn.Module, wide: Tensor) -> bool:
    """Whether a layer has this weight, up to what rounding to nearest explains."""
    for rows in _parts(wide):
        scale, right = layer.weight_scale[rows], wide[rows].float()
        allowed = torch.maximum(right.abs() * 2**-4, scale * _SMALLEST_STEP / 2)
        if not ((layer.weight[rows].float() * scale - right).abs() <= allowed * (1 + 1e-5)).all():
            return False
    return True


def _hold(layer: ColumnParallelLinear | RowParallelLinear, by: Rounding) -> None:
    assert not layer.sequence_parallel, "the product that is left out here would gather its input over ranks"
    wide = layer.weight
    layer.wide_dtype = wide.dtype
    layer.weight = nn.Parameter(torch.empty_like(wide, dtype=FP8), requires_grad=False)
    scale = torch.empty(len(wide), 1, dtype=torch.float32, device=wide.device)
    layer.register_buffer("weight_scale", scale, persistent=False)
    layer._forward_impl = partial(_product, layer, by)


def _product(
    layer: nn.Module, by: Rounding, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object
) -> Tensor:
    """What stands for the product of a layer: of [..., K], rounded `by`, with its weight, and its bias added."""
    x, x_scale = by(input.reshape(-1, input.shape[-1]))
    output = scaled_product(x, x_scale, weight, layer.weight_scale, input.dtype).view(*input.shape[:-1], len(weight))
    return output if bias is None else output + bias


def _parts(wide: Tensor) -> Iterator[slice]:
    rows = max(1, _ELEMENTS_AT_ONCE // wide.shape[1])
    for first in range(0, len(wide), rows):
        yield slice(first, first + rows)
