"""Tensors that say they are on a GPU, what it refuses, and what it is waited for."""

from __future__ import annotations

import collections
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CPU = torch.device("cpu")
ENDS_WITH_DATA = {  # operations whose result the host has to see, or whose shape depends on data
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
PACKAGE = f"{os.sep}megatron_dlm{os.sep}"

waits: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
_tape: list[Callable[[], None]] | None = None  # of the graph that is being captured


def gpu() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return gpu()

    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    def get_device(self) -> int:
        return gpu().index

    def numpy(self, *_: Any, **__: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def type(self, *wanted: Any, **more: Any) -> Any:
        found = torch.Tensor.type(plain(self), *wanted, **more)
        return on_gpu(found) if isinstance(found, torch.Tensor) else found.replace("torch.", "torch.cuda.", 1)

    def __repr__(self, **_: Any) -> str:
        return f"{plain(self)!r} on {gpu()}"

    def __reduce_ex__(self, protocol: int) -> tuple:
        return on_gpu, (plain(self),)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        others = set(types) - {cls, torch.Tensor, torch.nn.Parameter}
        if others and any(type(one) in others for one in tree_iter((args, kwargs))):
            return NotImplemented  # another kind's, which knows both
        kwargs = {**(kwargs or {})}
        _look(func.name().removesuffix(".default"), args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU

        def compute() -> Any:
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)

        out = tree_map(lambda one: on_gpu(one) if isinstance(one, torch.Tensor) else one, compute())
        if _tape is not None:
            _tape.append(functools.partial(_again, compute, out))
        return out


def on_gpu(tensor: torch.Tensor) -> OnGpu:
    """The same memory, on the GPU."""
    return tensor if isinstance(tensor, OnGpu) else torch.Tensor._make_subclass(OnGpu, tensor, tensor.requires_grad)


def plain(tensor: Any) -> Any:
    """The same memory, on the CPU."""
    if not isinstance(tensor, OnGpu):
        return tensor
    with torch._C._DisableTorchDispatch():
        return torch.Tensor._make_subclass(torch.Tensor, tensor.detach())


def wait(kind: str) -> None:
    """The host waits for the GPU."""
    if asking(os.path.join("torch", "distributed", "distributed_c10d")):
        return  # gloo's own copies
    if _tape is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {kind} in {asking()}")
    waits[kind, asking()] += 1


def asking(package: str = PACKAGE) -> tuple[str, ...]:
    """Functions of a package that are at work, from the inside out: `rollout/engine.py:step`."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        name = frame.f_code.co_filename
        if package in name:
            found.append(f"{name.rsplit(package, 1)[1]}:{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(found)


def _look(name: str, args: tuple, kwargs: dict) -> None:
    """Refuse what a GPU refuses, and note what it is waited for."""
    if name in ENDS_WITH_DATA:
        wait(name)
    if name in ("aten::copy_", "aten::_to_copy"):
        if name == "aten::copy_" and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
            wait("copy to the GPU" if isinstance(args[0], OnGpu) else "copy to the CPU")
        return
    if name in INDEXING:
        for index in tree_iter(args[1]):
            fills = name != "aten::index.Tensor" and args[2].dim() == 0 and not isinstance(args[2], OnGpu)
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and not fills:
                wait(f"{name} by a mask")
            if isinstance(index, torch.Tensor) and not isinstance(index, OnGpu):
                wait("copy of an index to the GPU")
        args = (args[0], *args[2:])
    given = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
    here = [one for one in given if isinstance(one, OnGpu)]
    there = [one for one in given if not isinstance(one, OnGpu) and one.dim()]  # a single number may be anywhere
    if torch._C._current_graph_task_id() != -1:  # gradients of what nobody used are zeros, made behind our back
        there = [one for one in there if one.any()]
    if here and there:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} in {asking()}")


def _again(compute: Callable[[], Any], out: Any) -> None:
    """A captured operation, its results where they were."""
    for old, new in zip(tree_iter(out), tree_iter(compute())):
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.data_ptr() != new.data_ptr():
            plain(old).copy_(plain(new))


class _Move(torch.autograd.Function):
    """From one device to the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to_gpu: bool) -> torch.Tensor:
        ctx.came_from_gpu = isinstance(x, OnGpu)
        copy = plain(x).clone()
        return on_gpu(copy) if to_gpu else copy

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        copy = plain(gradient).clone()
        return on_gpu(copy) if ctx.came_from_gpu else copy, None


def _moved(tensor: torch.Tensor, to_gpu: bool) -> torch.Tensor:
    if isinstance(tensor, OnGpu) == to_gpu:
        return tensor
    wait("copy to the GPU" if to_gpu else "copy to the CPU")
    return _Move.apply(tensor, to_gpu)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _is_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] in ("cpu", "cuda", "meta")
    return isinstance(value, torch.device)


class Devices(TorchFunctionMode):
    """Reads the devices in the arguments of torch's functions."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return _moved(args[0], func is torch.Tensor.cuda)
        if func is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            wait("tolist")
            return plain(args[0]).tolist()
        if kwargs.pop("pin_memory", False) and func is torch.Tensor.new_empty:
            raise RuntimeError("only tensors on the CPU can be pinned")
        device = kwargs.pop("device", None)
        if device is None:
            return func(*args, **kwargs)
        if _is_device(device) and torch.device(device).type == "meta":
            return func(*args, device=device, **kwargs)
        from_host = func in (torch.tensor, torch.as_tensor)
        out = func(*(tree_map(plain, args) if from_host else args), device=CPU, **kwargs)
        if not _is_gpu(device):
            return tree_map(plain, out)
        if from_host and not isinstance(args[0], OnGpu):
            wait("copy to the GPU")
        return on_gpu(out)

    @staticmethod
    def _to(tensor: torch.Tensor, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        rest = []
        for one in args:
            if isinstance(one, torch.Tensor):
                device, one = one.device, one.dtype
            if _is_device(one) or type(one) is int:
                device = one
            else:
                rest.append(one)
        out = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if device is None or (not isinstance(device, int) and torch.device(device).type == "meta"):
            return out if device is None else out.to(device)
        return _moved(out, _is_gpu(device))


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.tape: list[Callable[[], None]] = []

    def replay(self) -> None:
        waits["a graph was replayed", asking()] += 1
        for operation in self.tape:
            operation()


@contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    global _tape
    waits["a graph was captured", asking()] += 1
    _tape = graph.tape
    try:
        yield
    finally:
        _tape = None


def kernel(run: Callable) -> Callable:
    """What runs on the GPU as one operation, whatever it does on the CPU."""

    def quietly(*args: Any, **kwargs: Any) -> Any:
        global _tape
        tape, _tape = _tape, None
        before = waits.copy()
        try:
            return run(*args, **kwargs)
        finally:
            _tape = tape
            waits.clear()
            waits.update(before)

    def launch(*args: Any, **kwargs: Any) -> Any:
        out = quietly(*args, **kwargs)
        if _tape is not None:
            _tape.append(functools.partial(_again, functools.partial(quietly, *args, **kwargs), out))
        return out

    return launch


def capturing() -> bool:
    """Whether a graph is being captured."""
    return _tape is not None
