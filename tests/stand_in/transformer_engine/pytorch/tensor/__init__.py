"""Weights that are kept in FP8: bytes with a scale, which operations read as numbers of the type that they claim.

A weight has a copy for the backward pass (`for_backward`), as the transposed ones of GPUs that multiply in one order
alone. It follows what is written into the weight; what an optimizer writes shard by shard it follows when it is told to
(utils.post_all_gather_processing).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(_FP8).max


class QuantizedTensor(torch.Tensor):
    _data: Tensor
    _scale: float
    for_backward: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale: float, like: Tensor) -> QuantizedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=like.dtype, device=data.device)
        tensor._data, tensor._scale, tensor.for_backward = data, scale, like
        return tensor

    def follow(self) -> None:
        self.for_backward.copy_(self.dequantize())

    @classmethod
    def of(cls, exact: Tensor) -> QuantizedTensor:
        """Of these numbers, which it still knows."""
        tensor = cls(torch.empty(exact.shape, dtype=torch.uint8), 1.0, torch.empty_like(exact))
        tensor.take(exact)
        return tensor

    def take(self, exact: Tensor) -> None:
        self.put(exact, LARGEST / max(exact.abs().max().item(), 1e-12))
        self.follow()

    def put(self, exact: Tensor, scale: float, start: int = 0) -> None:
        """Write a shard of all numbers, in their order, under the scale of them all."""
        bytes_ = (exact.float() * scale).clamp(-LARGEST, LARGEST).to(_FP8).view(torch.uint8).flatten()
        self._data.view(-1)[start : start + len(bytes_)] = bytes_
        self._scale = scale

    def dequantize(self) -> Tensor:
        return (self._data.view(_FP8).float() / self._scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        target = args[0]
        if func is torch.ops.aten.detach.default:
            same = cls(target._data, target._scale, target.for_backward)
            return same
        plain = lambda value: value.dequantize() if isinstance(value, cls) else value
        out = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        if func._schema.is_mutable and isinstance(target, cls):
            target.take(out)
            return target
        return out
