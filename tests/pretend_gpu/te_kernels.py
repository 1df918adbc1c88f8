"""Kernels of Transformer Engine (the module transformer_engine_torch) in plain torch, for the pretended GPU.

Only what is compiled is replaced: layers, quantized tensors and optimizers are the package's own Python. So a layer of
ours that asks the package for what it has not, or takes from it what it does not give, fails here as it would on a GPU.
What runs in FP8 is rounded to it (te_fp8.py), then multiplied in float32; what a GPU would refuse to multiply is
refused. Sums are in another order than on a GPU.

Functions have the names and the arguments of those that they stand for.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.pretend_gpu.tensors import kernel

_KERNELS: dict[str, Callable] = {}
_FP8_MULTIPLE = 16  # what cuBLAS wants of the numbers that a product in FP8 sums over


def of_tex(run: Callable) -> Callable:
    """Mark a function as one of transformer_engine_torch."""
    _KERNELS[run.__name__] = kernel(torch.no_grad()(run))
    return run


def install() -> None:
    """Transformer Engine must have been imported, and what took functions from it, too."""
    import transformer_engine.pytorch  # noqa: F401 (loads the compiled module)
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import distributed

    from tests.pretend_gpu import te_fp8

    te_fp8.install()
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    replaced = {id(getattr(tex, name)): run for name, run in _KERNELS.items()}
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("transformer_engine", "megatron.core")):
            for name, value in list(vars(module).items()):
                if id(value) in replaced:
                    setattr(module, name, replaced[id(value)])


def torch_dtype(dtype: Any) -> torch.dtype:
    """Transformer Engine's name of a type, or torch's own -> torch's."""
    from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch

    return dtype if isinstance(dtype, torch.dtype) else TE_DType_To_Torch[DType.cast(dtype)]


def into(result: Tensor, output: Any, quantizer: Any) -> Any:
    """What a kernel returns: its result, in FP8 if there is a quantizer, written into the output if there is one."""
    if quantizer is not None:
        from tests.pretend_gpu.te_fp8 import quantize

        return quantize(result, quantizer, output)
    return result if output is None else output.copy_(result)


# Norms


@of_tex
def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, _margin: int, zero_centered: bool
) -> list[Any]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    result = wide * scale.unsqueeze(-1) * (weight.float() + zero_centered)
    return [into(result.to(torch_dtype(dtype)), out, quantizer), None, scale]


@of_tex
def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> list[Tensor]:
    scale = scale.unsqueeze(-1)
    normed, wide = x.float() * scale, gradient.float()
    through = wide * (weight.float() + zero_centered)
    of_x = scale * (through - normed * (through * normed).mean(-1, keepdim=True))
    return [of_x.to(x.dtype), (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)]


# Products. A and B are as cuBLAS names them, columns first: read as rows, the result is B A, A turned if transa says so


@of_tex
def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    bias: Tensor | None,
    _bias_dtype: Any,
    gelu: bool,
    _gelu_in: Tensor | None,
    grad: bool,
    _workspace: Tensor,
    _workspace_size: int,
    accumulate: bool,
    _use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    if gelu or comm_overlap is not None or extra_output is not None:
        raise NotImplementedError
    found, sums = _product(A, transa, B, transb, bias, grad)
    found = found * alpha
    if accumulate:
        return [out.add_(found), sums, None, None]
    wanted = torch_dtype(dtype) if dtype is not None else (out.dtype if out is not None else torch.bfloat16)
    return [into(found.to(wanted), out, quantizer), sums, None, None]


@of_tex
def te_general_grouped_gemm(
    A: Sequence[Any],
    transa: bool,
    B: Sequence[Any],
    transb: bool,
    out: Sequence[Tensor],
    _dtype: Any,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    _bias_dtype: Any,
    single_output: bool,
    _gelu_in: Sequence[Tensor],
    grad: bool,
    _workspaces: Sequence[Tensor],
    _workspace_size: int,
    accumulate: bool,
    _use_split_accumulator: bool,
    _processors: int,
) -> Sequence[Tensor]:
    parts = out[0].split(list(m_splits)) if single_output else out
    for one, other, part, added in zip(A, B, parts, bias):
        found, sums = _product(one, transa, other, transb, added if added.numel() else None, grad)
        if sums is not None:
            added.copy_(sums)
        part.add_(found) if accumulate else part.copy_(found)
    return bias


def _product(
    A: Any, transa: bool, B: Any, transb: bool, bias: Tensor | None, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """In float32; and of a gradient the sum over its tokens, if there is a bias."""
    (one, in_fp8), (other, too) = _numbers(A, transa), _numbers(B, not transb)
    if in_fp8 != too:
        raise RuntimeError(f"a product of {type(A).__name__} with {type(B).__name__}")
    shape = () if transb else other.shape[:-1]
    one, other = one.flatten(0, -2), other.flatten(0, -2)
    sums = other.sum(0).to(bias.dtype) if grad and bias is not None else None
    one, other = one.T if transa else one, other.T if transb else other
    if in_fp8 and other.numel() and (other.shape[1] % _FP8_MULTIPLE or one.shape[1] % _FP8_MULTIPLE):
        raise RuntimeError(f"cuBLAS multiplies no {tuple(other.shape)} with {tuple(one.shape)} in FP8")
    found = other @ one
    if bias is not None and not grad:
        found = found + bias.float()
    return (found.reshape(*shape, found.shape[-1]) if shape else found), sums


def _numbers(tensor: Any, rowwise: bool) -> tuple[Tensor, bool]:
    """What a product reads of a tensor, in float32; whether it was in FP8."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    if not isinstance(tensor, QuantizedTensorStorage):
        return tensor.float(), False
    from tests.pretend_gpu.te_fp8 import read

    return read(tensor, rowwise), True


# Rows of experts, filled up to what FP8 takes


@of_tex
def fused_multi_row_padding(source: Tensor, target: Tensor, sizes: Sequence[int], padded: Sequence[int]) -> None:
    for rows, place, size in zip(source.split(list(sizes)), target.split(list(padded)), sizes):
        place[:size] = rows
        place[size:] = 0


@of_tex
def fused_multi_row_unpadding(source: Tensor, target: Tensor, padded: Sequence[int], sizes: Sequence[int]) -> None:
    for rows, place, size in zip(source.split(list(padded)), target.split(list(sizes)), sizes):
        place.copy_(rows[:size])


@of_tex
def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    return into(tensor.transpose(0, 1).contiguous(), out, None)


# Rotary positions of queries and keys, the same for all heads: [tokens, rows, heads, width]


def _turned(x: Tensor, angles: Tensor, start: int, interleaved: bool, backward: bool) -> Tensor:
    angles = angles[start : start + x.shape[0]].to(x.device)
    width = angles.shape[-1]
    part, rest = x[..., :width].float(), x[..., width:]
    if interleaved:
        half = lambda y: torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    else:
        half = lambda y: torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1)
    sines = -angles.sin() if backward else angles.sin()
    return torch.cat(((part * angles.cos() + half(part) * sines).to(x.dtype), rest), -1)


def _rope(x: Tensor, angles: Tensor, start: Any, form: Any, interleaved: bool, rest: tuple, backward: bool) -> Tensor:
    if start is not None or form.name != "NVTE_SBHD" or any(one is not None for one in rest[:1]) or rest[1] != 1:
        raise NotImplementedError
    return _turned(x, angles, 0, interleaved, backward)


@of_tex
def fused_rope_forward(x: Tensor, angles: Tensor, start: Any, form: Any, interleaved: bool, *rest: Any) -> Tensor:
    return _rope(x, angles, start, form, interleaved, rest, False)


@of_tex
def fused_rope_backward(x: Tensor, angles: Tensor, start: Any, form: Any, interleaved: bool, *rest: Any) -> Tensor:
    return _rope(x, angles, start, form, interleaved, rest, True)


# Optimizers: lists of tensors, one operation each


@of_tex
def multi_tensor_adam(
    _chunk: int,
    _noop: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    weight_decay: float,
) -> None:
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square, *master in zip(*lists):
        weight = master[0] if master else parameter.float()
        gradient = gradient.float() if decoupled else gradient.float() + weight_decay * weight
        new_mean = beta1 * mean.float() + (1 - beta1) * gradient
        new_square = beta2 * square.float() + (1 - beta2) * gradient.square()
        change = (new_mean / first) / ((new_square / second).sqrt() + eps)
        if decoupled:
            change = change + weight_decay * weight
        for tensor, value in ((mean, new_mean), (square, new_square), (parameter, weight - lr * change)):
            if master and tensor is parameter:
                master[0].copy_(value)
            tensor.copy_(value)


@of_tex
def multi_tensor_scale(_chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    for source, target in zip(*lists):
        target.copy_(source.float() * factor)
        noop.logical_or_(~target.isfinite().all())


@of_tex
def multi_tensor_scale_tensor(_chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], factor: Tensor) -> None:
    for source, target in zip(*lists):
        target.copy_(source.float() * factor)
        noop.logical_or_(~target.isfinite().all())


@of_tex
def multi_tensor_l2norm(
    _chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in itertools.chain(*lists)])
    noop.logical_or_(~norms.isfinite().all())
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)
