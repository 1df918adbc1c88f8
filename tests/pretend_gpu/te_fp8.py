"""FP8 of Transformer Engine in plain torch: numbers are scaled, rounded and stored as its kernels do.

Per tensor, with the scale of numbers seen before (delayed) or of these (tensorwise); or per block of 128 numbers of a
row, or of 128 rows and columns (blockwise). On a GPU of compute capability 9 a product reads two operands whose rows
lie along its sum, so what is multiplied both ways has a second, turned copy; `read` takes it where the product would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.pretend_gpu.te_kernels import of_tex, torch_dtype
from tests.pretend_gpu.tensors import CPU, Devices

BLOCK = 128


@of_tex
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
        Float8BlockQuantizer,
    )

    if noop is not None and noop.item():
        return output
    tensor = tensor.detach().contiguous()
    blockwise = isinstance(quantizer, Float8BlockQuantizer)
    buffers = _in_blocks(tensor, quantizer) if blockwise else _in_one_scale(tensor, quantizer)
    if output is None:
        return _wrapped(buffers, quantizer, tensor.shape, tensor.dtype)
    for name, new in buffers.items():
        old = getattr(output, name)
        if old is not None and new is not None:
            old.copy_(new.view(old.shape))
        else:
            setattr(output, name, new)
    if not blockwise:
        output._transpose_invalid = output._transpose is None
    return output


@of_tex
def split_quantize(
    tensor: Tensor, sizes: Sequence[int], quantizers: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(list(sizes)), quantizers)]


@of_tex
def multi_tensor_quantize(tensors: Sequence[Tensor], quantizers: Sequence[Any]) -> list[Any]:
    return [quantize(tensor, quantizer) for tensor, quantizer in zip(tensors, quantizers)]


@of_tex
def bgrad_quantize(gradient: Tensor, quantizer: Any) -> list[Any]:
    sums = gradient.float().flatten(0, -2).sum(0).to(gradient.dtype)
    return [sums, quantize(gradient, quantizer)]


@of_tex
def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    shape = tuple(shape)
    if isinstance(quantizer, Float8Quantizer):
        wanted = {"_scale_inv": ((1,), torch.float32)}
        wanted["_data"] = (shape, torch.uint8) if quantizer.rowwise_usage else None
        wanted["_transpose"] = ((shape[-1], *shape[:-1]), torch.uint8) if quantizer.columnwise_usage else None
    else:
        wanted = quantizer.inner_tensor_specs(shape)
    make = lambda of: None if of is None else torch.empty(of[0], dtype=of[1], device=device)
    return _wrapped({name: make(of) for name, of in wanted.items()}, quantizer, shape, dtype)


@of_tex
def dequantize(tensor: Any, dtype: Any) -> Tensor:
    return _read_one_scale(tensor, tensor._data).to(torch_dtype(dtype))


@of_tex
def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def read(tensor: Any, rowwise: bool) -> Tensor:
    """The numbers of one of the two copies, in float32.

    Raises:
        RuntimeError: there is no such copy, or it is of numbers that are no longer these.
    """
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (
        Float8TensorStorage,
    )

    kind = "rows" if rowwise else "columns"
    if isinstance(tensor, Float8TensorStorage):
        data = tensor._data if rowwise else tensor._transpose
        if data is None or (not rowwise and tensor._transpose_invalid):
            raise RuntimeError(f"a product in FP8 wants {kind} of a tensor that has none")
        numbers = _read_one_scale(tensor, data)
        return numbers if rowwise else numbers.movedim(0, -1)
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    if data is None:
        raise RuntimeError(f"a product in FP8 wants {kind} of a tensor that has none")
    one_copy = dict(rowwise_data=data, rowwise_scale_inv=tensor._rowwise_scale_inv)
    one_copy |= dict(columnwise_data=None, columnwise_scale_inv=None)
    if not rowwise:
        one_copy = dict(columnwise_data=data, columnwise_scale_inv=tensor._columnwise_scale_inv)
        one_copy |= dict(rowwise_data=None, rowwise_scale_inv=None)
    storage = _storage_classes(blockwise=True)[0]
    same = storage(**one_copy, fp8_dtype=tensor._fp8_dtype, quantizer=None, is_2D_scaled=tensor._is_2D_scaled)
    return same.dequantize(dtype=torch.float32)


# One scale for a tensor


def _in_one_scale(tensor: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    wide = tensor.float()
    largest = wide.abs().max() if wide.numel() else wide.new_zeros(())
    if isinstance(quantizer, Float8Quantizer):
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, largest.reshape(quantizer.amax.shape)))
        scale = quantizer.scale.reshape(())
    else:
        if quantizer.with_amax_reduction:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
        scale = _scale_of(largest, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = _rounded(wide * scale, quantizer.dtype)
    return {
        "_data": data if quantizer.rowwise_usage else None,
        "_transpose": data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None,
        "_scale_inv": scale.reciprocal().reshape(1),
    }


def _read_one_scale(tensor: Any, data: Tensor) -> Tensor:
    return data.view(torch_dtype(tensor._fp8_dtype)).float() * tensor._scale_inv


def _scale_of(largest: Tensor, dtype: Any, power_of_2: bool, epsilon: float) -> Tensor:
    largest = largest.clamp_min(epsilon)
    scale = torch.finfo(torch_dtype(dtype)).max / largest
    scale = scale.clamp_max(torch.finfo(torch.float32).max)
    if power_of_2:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return torch.where((largest > 0) & largest.isfinite(), scale, torch.ones_like(scale))


def _rounded(numbers: Tensor, dtype: Any) -> Tensor:
    """Bytes of the nearest numbers of this type."""
    kind = torch_dtype(dtype)
    largest = torch.finfo(kind).max
    return numbers.clamp(-largest, largest).to(kind).view(torch.uint8)


# A scale for each block


def _in_blocks(tensor: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    wide = tensor.float().reshape(-1, tensor.shape[-1])
    turned = (tensor.shape[-1], *tensor.shape[:-1])
    square = quantizer.block_scaling_dim == 2
    data, scales = _blocks(wide, quantizer, square)
    other, others = (data.T, scales.T) if square else _blocks(wide.T.contiguous(), quantizer, square)
    stored = lambda table: _padded(table if square else table.T)
    rows, columns = quantizer.rowwise_usage, quantizer.columnwise_usage
    return {
        "_rowwise_data": data.reshape(tensor.shape) if rows else None,
        "_rowwise_scale_inv": stored(scales) if rows else None,
        "_columnwise_data": other.contiguous().reshape(turned) if columns else None,
        "_columnwise_scale_inv": stored(others) if columns else None,
    }


def _blocks(table: Tensor, quantizer: Any, square: bool) -> tuple[Tensor, Tensor]:
    """Bytes of a table, and one over the scales: of its blocks of columns, for each row or each block of rows."""
    height, width = table.shape
    tall = BLOCK if square else 1
    full = F.pad(table, (0, -width % BLOCK, 0, -height % tall))
    blocks = full.view(full.shape[0] // tall, tall, full.shape[1] // BLOCK, BLOCK)
    scales = _scale_of(blocks.abs().amax((1, 3)), quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = _rounded(blocks * scales[:, None, :, None], quantizer.dtype).view(full.shape)
    return data[:height, :width].contiguous(), scales.reciprocal()


def _padded(scales: Tensor) -> Tensor:
    return F.pad(scales, (0, -scales.shape[1] % 4)).contiguous()


@of_tex
def fp8_block_scaling_compute_partial_amax(
    shard: Tensor, largest: Tensor, height: int, width: int, start: int, block: int
) -> None:
    rows, columns = _block_of(shard, width, start, block)
    flat = largest.flatten().scatter_reduce(0, rows * largest.shape[1] + columns, shard.float().abs(), "amax")
    largest.copy_(flat.view(largest.shape))


@of_tex
def fp8_block_scaling_partial_cast(
    shard: Tensor, out: Tensor, scales: Tensor, height: int, width: int, start: int, block: int, dtype: Any
) -> None:
    rows, columns = _block_of(shard, width, start, block)
    out.copy_(_rounded(shard.float() * scales.flatten()[rows * scales.shape[1] + columns], dtype).view(out.shape))


def _block_of(shard: Tensor, width: int, start: int, block: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(start, start + shard.numel(), device=shard.device)
    return place // width // block, place % width // block


# Scales


@of_tex
def compute_amax(tensor: Tensor, largest: Tensor) -> None:
    largest.copy_(tensor.float().abs().max().reshape(largest.shape))


@of_tex
def multi_tensor_compute_scale_and_scale_inv(
    _chunk: int,
    _noop: Tensor,
    lists: Sequence[Sequence[Tensor]],
    largest_of_type: float,
    power_of_2: bool,
    epsilon: float,
) -> None:
    from transformer_engine.pytorch.constants import DType

    dtype = DType.kFloat8E4M3 if largest_of_type == torch.finfo(torch.float8_e4m3fn).max else DType.kFloat8E5M2
    for largest, scale, inverse in zip(*lists):
        scale.copy_(_scale_of(largest, dtype, power_of_2, epsilon))
        inverse.copy_(scale.reciprocal())


@of_tex
def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor,
    histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    algorithm: str,
    dtype: Any,
    margin: float,
) -> None:
    """The newest of each history is of this step. It moves to the end, and its place is empty for the next step's."""
    limit = torch.finfo(torch_dtype(dtype)).max
    parts = reduced.split([history.shape[1] for history in histories])
    for newest, history, scale in zip(parts, histories, scales):
        history[0] = newest
        largest = history.amax(0) if algorithm == "max" else newest
        known = (largest > 0) & largest.isfinite()
        wanted = (limit / largest / 2**margin).clamp_max(torch.finfo(torch.float32).max)
        scale.copy_(torch.where(known, wanted, scale))
        if len(history) > 1:
            history.copy_(history.roll(-1, 0))
        history[0] = 0


# The package's tensors


def _storage_classes(blockwise: bool) -> tuple[type, type]:
    """Without and with what makes it a tensor of torch."""
    if blockwise:
        from transformer_engine.pytorch.tensor import float8_blockwise_tensor as module

        return module.Float8BlockwiseQTensorStorage, module.Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor import float8_tensor as module

    return module.Float8TensorStorage, module.Float8Tensor


def _wrapped(buffers: dict[str, Tensor | None], quantizer: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    blockwise = any("rowwise" in name or "columnwise" in name for name in buffers)
    bare, whole = _storage_classes(blockwise)
    given: dict[str, Any] = dict(fp8_dtype=quantizer.dtype, quantizer=quantizer)
    if blockwise:
        names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
        given |= {name: buffers.get(f"_{name}") for name in names}
        given["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    else:
        given |= dict(data=buffers.get("_data"), data_transpose=buffers.get("_transpose"))
        given["fp8_scale_inv"] = buffers["_scale_inv"]
    if quantizer.internal:
        return bare(**given, fake_dtype=dtype)
    device = next(buffer.device for buffer in buffers.values() if buffer is not None)
    return whole(shape=torch.Size(shape), dtype=dtype, device=device, **given)


def install() -> None:
    """The package's tensors, which hold others, are on the CPU in torch's eyes, which looks for streams otherwise."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    make = QuantizedTensor.__new__

    def new(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        return make(cls, *args, device=CPU, **kwargs)

    QuantizedTensor.__new__ = new
    QuantizedTensor.type = lambda tensor: torch.Tensor.type(tensor).replace("torch.", "torch.cuda.", 1)
    QuantizedTensor.is_cuda = property(lambda tensor: tensor.device.type == "cuda")
    for kind in (QuantizedTensor, *(_storage_classes(blockwise)[1] for blockwise in (False, True))):
        kind.__torch_dispatch__ = _among_devices(kind.__dict__["__torch_dispatch__"].__func__)


def _among_devices(dispatch: Callable) -> classmethod:
    """torch takes the mode away while one of its functions is at work."""

    def run(cls: type, *args: Any) -> Any:
        with Devices():
            return dispatch(cls, *args)

    return classmethod(run)
