"""Bytes of tensors that come and go, counted where they are made: a stand-in for a device's allocator.

    with LiveBytes() as live:
        loss = model(...)          # live.now: what the backward pass will need, and the loss
        loss.backward()            # live.peak: the most that was there at a time
    saved = SavedBytes()
    with saved.counting():
        loss = model(...)
    saved.total()                  # distinct storages that autograd keeps, without those of the parameters

Works on tensors without data and on real ones. Tensors that were there before are not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Attributes: now, peak: bytes of storages that were made within the context and are still there; the most of it.

    Args:
        known: tensors that do not count whatever is done to them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            self._remember(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A storage that is only handed on was made by someone else: count results whose storage no argument has.
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._seen:
                    self._remember(storage, storage.nbytes())
        return result

    def _remember(self, storage: UntypedStorage, nbytes: int) -> None:
        key = storage._cdata
        self.now += nbytes
        self.peak = max(self.peak, self.now)

        def gone(_: weakref.ref) -> None:
            self.now -= nbytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)


class SavedBytes:
    """What autograd keeps for the backward pass.

    Args:
        besides: tensors whose storages do not count (parameters, tables that all layers share).
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self._besides = {tensor.untyped_storage()._cdata for tensor in besides}
        self._found: dict[int, tuple[weakref.ref, int]] = {}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def total(self) -> int:
        """Bytes of the storages that are still kept."""
        return sum(nbytes for reference, nbytes in self._found.values() if reference() is not None)

    def _pack(self, tensor: Tensor) -> tuple[Tensor, bool]:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._besides and (key not in self._found or self._found[key][0]() is None):
            self._found[key] = (weakref.ref(storage), storage.nbytes())
        # A result that its own operation keeps would hang on itself, and stay when nobody needs it any more.
        return (tensor if tensor.is_leaf else tensor.detach()), tensor.requires_grad


def _unpack(packed: tuple[Tensor, bool]) -> Tensor:
    tensor, requires_grad = packed
    return tensor.requires_grad_(requires_grad)
