"""An update as one run of bytes: it passes between processes, and to a device, in a single copy.

    buffer, label = pack(update)                       # uint8 [bytes] and a few hundred bytes that say what is where
    update = unpack(buffer.to(device), label)          # its tensors are views of the buffer

Invariant (tests/sft/test_parcel.py): what is unpacked is what was packed, bit by bit, whatever tensors are in it.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; a tensor starts at a multiple, so that a view of it is one of whole numbers


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a tensor lies: from byte `start` on."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pack(value: Any) -> tuple[Tensor, bytes]:
    """(buffer, label) of a value on the host. Its tensors may be fields of dataclasses and items of lists and tuples,
    within each other; everything else in it goes into the label, by pickle.
    """
    pieces: list[_Piece] = []
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> _Piece:
        start = pieces[-1].start + pieces[-1].size if pieces else 0
        pieces.append(_Piece(-(-start // ALIGNMENT) * ALIGNMENT, tuple(tensor.shape), tensor.dtype))
        tensors.append(tensor)
        return pieces[-1]

    label = pickle.dumps(_changed(value, Tensor, note))
    end = pieces[-1].start + pieces[-1].size if pieces else 0
    buffer = torch.zeros(max(end, ALIGNMENT), dtype=torch.uint8)
    for piece, tensor in zip(pieces, tensors):
        _view(buffer, piece).copy_(tensor)
    return buffer, label


def unpack(buffer: Tensor, label: bytes) -> Any:
    """What `pack` was given, with its tensors on the buffer's device, as views of it."""
    return _changed(pickle.loads(label), _Piece, lambda piece: _view(buffer, piece))


def _view(buffer: Tensor, piece: _Piece) -> Tensor:
    return buffer[piece.start : piece.start + piece.size].view(piece.dtype).view(piece.shape)


def _changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of the value with `change` applied to whatever is of that kind."""
    if isinstance(value, kind):
        return change(value)
    if is_dataclass(value):
        given = (field.name for field in fields(value) if field.init)  # the others are nobody's to pass on
        return type(value)(*(_changed(getattr(value, name), kind, change) for name in given))
    if isinstance(value, (list, tuple)):
        return type(value)([_changed(one, kind, change) for one in value])
    return value
