"""A GPU of the mind, for hosts without one: tensors that say they are on cuda:0 and compute on the CPU.

What a real one would refuse is refused: operations over tensors of two devices, a tensor of the wrong device in a
collective, a tensor on it turned into numpy. What makes the host wait for it is written down, with the functions of
this package that asked for it; and while a CUDA graph is captured nothing may. A graph that was captured is replayed by
doing the captured operations again, on the same memory.

    python -m tests.pretend_gpu        a command server (command_server.py) on it

It has no kernels of its own: attention that torch compiles for GPUs takes its way on CPUs here, torch.compile does
nothing, Triton's kernels run in Triton's interpreter, and FlashAttention 3 is a stand-in. Streams and events have always been waited for.

A child of the server whose environment names a file in PRETEND_GPU_WAITS writes there, when it ends, what it waited
for: a list of [kind, functions from the inside out, how often].
"""

from __future__ import annotations

import collections
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from tests.rollout import fake_kernels

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
_backends: dict[Any, str] = {}  # process group, or None for the world's: what it should be made of


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

    def __reduce_ex__(self, protocol: int) -> tuple:
        return on_gpu, (plain(self),)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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
    if _asking(os.path.join("torch", "distributed", "distributed_c10d")):
        return  # gloo's own copies
    if _tape is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {kind} in {_asking()}")
    waits[kind, _asking()] += 1


def _asking(package: str = PACKAGE) -> tuple[str, ...]:
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
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} in {_asking()}")


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


class _Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.tape: list[Callable[[], None]] = []

    def replay(self) -> None:
        for operation in self.tape:
            operation()


@contextmanager
def _capture(graph: _Graph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    global _tape
    _tape = graph.tape
    try:
        yield
    finally:
        _tape = None


def _module_to_gpu(module: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
    """torch.nn.Module.cuda; parameters get new objects, because one cannot become of another type."""
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in moved:
                    new = on_gpu(plain(tensor.detach()).clone()).requires_grad_(tensor.requires_grad)
                    new.__dict__.update(tensor.__dict__)
                    new._is_param = isinstance(tensor, torch.nn.Parameter)
                    moved[id(tensor)] = new
                if tensor is not None:
                    table[name] = moved[id(tensor)]
    return module


def _install_groups() -> None:
    """Groups of gloo that know which backend they should have, and take tensors of its device alone."""
    distributed_c10d = dist.distributed_c10d
    init, new = dist.init_process_group, distributed_c10d.new_group

    def init_process_group(backend: str, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        _backends[None] = backend
        init("gloo", *args, **kwargs)

    def new_group(*args: Any, backend: str | None = None, pg_options: Any = None, **kwargs: Any) -> Any:
        group = new(*args, backend="gloo", **kwargs)
        _backends[group] = backend or _backends[None]
        return group

    dist.init_process_group = init_process_group
    dist.new_group = distributed_c10d.new_group = new_group
    for name in (
        *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "broadcast"),
        *("gather", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
    ):
        setattr(dist, name, _checked(name, getattr(dist, name)))
    one = dist.P2POp
    one.__new__ = lambda cls, *_, **__: object.__new__(cls)
    make = one.__init__
    one.__init__ = lambda self, op, *args, **kwargs: make(self, getattr(op, "__wrapped__", op), *args, **kwargs)


def _checked(name: str, collective: Callable) -> Callable:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or next((one for one in args if isinstance(one, dist.ProcessGroup)), None)
        wanted = _backends.get(group, _backends[None])
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and isinstance(tensor, OnGpu) != (wanted == "nccl"):
                raise RuntimeError(f"{name} of a tensor on {tensor.device} in a group of {wanted}: {_asking()}")
        return collective(*args, **kwargs)

    return call


def _install_cuda() -> None:
    from megatron_dlm.platform import cpu

    tensor_cuda = torch.Tensor.cuda
    cpu._install_cuda_namespace()
    torch.Tensor.cuda, torch.nn.Module.cuda = tensor_cuda, _module_to_gpu
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.Tensor.is_pinned = lambda *_: True
    cuda = torch.cuda
    properties = type("Properties", (), dict(name="a GPU of the mind", total_memory=2**34, major=9, minor=0))
    for name, answer in dict(
        is_available=True,
        is_initialized=True,
        is_bf16_supported=True,
        device_count=8,
        get_device_capability=(9, 0),
        get_device_properties=properties,
        get_device_name=properties.name,
        mem_get_info=(2**34, 2**34),
        memory_stats=collections.defaultdict(int),
        graph_pool_handle=(0, 0),
    ).items():
        setattr(cuda, name, functools.partial(lambda value, *_, **__: value, answer))
    cuda.current_device = lambda: gpu().index
    cuda._lazy_init = lambda: None
    cuda.CUDAGraph, cuda.graph = _Graph, _capture
    cuda.is_current_stream_capturing = lambda: _tape is not None
    cuda.memory._record_memory_history = lambda *_, **__: None
    torch.version.cuda = "13.0"
    cpu._install_collectives()
    cpu._share_gloo_devices()


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


def _install_kernels() -> None:
    """Ways on the CPU for what is compiled for a GPU."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    import torch._dynamo

    torch._dynamo.config.disable = True
    from megatron_dlm.model.attention_flex import FlexAttention

    FlexAttention._on_gpu = FlexAttention._on_cpu
    flash = fake_kernels.flash_attn_interface()
    flash.flash_attn_with_kvcache = kernel(flash.flash_attn_with_kvcache)
    sys.modules[flash.__name__] = flash
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    interpreter.GridExecutor.__call__ = kernel(interpreter.GridExecutor.__call__)


def install() -> None:
    """For the life of this process; before megatron-core is imported."""
    _install_cuda()
    _install_groups()
    _install_kernels()
    import torch.autograd.graph as graph
    from megatron.core.tensor_parallel import random as random_state

    random_state._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random_state._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    run = graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with Devices():  # torch takes the mode away while it handles torch.autograd.backward
            return run(*args, **kwargs)

    graph._engine_run_backward = torch.autograd._engine_run_backward = backward
    Devices().__enter__()


def serve() -> None:
    install()
    import megatron_dlm.__main__ as entry
    from tests.command_server import serve as serve_commands

    main = entry.main

    def with_account(argv: list[str]) -> int:
        try:
            return main(argv)
        finally:
            if "PRETEND_GPU_WAITS" in os.environ and os.environ.get("RANK", "0") == "0":
                with open(os.environ["PRETEND_GPU_WAITS"], "w") as file:
                    json.dump([[kind, asking, count] for (kind, asking), count in waits.items()], file)

    entry.main = with_account
    serve_commands()


if __name__ == "__main__":
    serve()
