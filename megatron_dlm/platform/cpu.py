"""What megatron-core needs in order to run on a host without CUDA, unchanged.

megatron-core asks CUDA for five things. Each gets the plainest answer that is true of a CPU:
  - the current device: the CPU;
  - streams and events: there is one queue and it is always empty, so waiting does nothing;
  - random state: the generator of the CPU (the tracker that keeps tensor-parallel ranks' draws apart then works as it
    does on CUDA);
  - memory: nothing to free, nothing to report;
  - tensors on "cuda": a function mode, `CudaMeansCpu`, rewrites the device. It costs time on every torch call; the two
    modules of megatron-core that ask for such tensors in the middle of forward and backward get a view of `torch` with
    the same answer, which costs nothing elsewhere.

What is done to `torch` holds for any megatron-core. What is done to megatron-core itself (`_patch_megatron`) names
some of its modules and was written for releases 0.16: another one may need other places.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "as_tensor")


class Stream:
    """A queue that is always empty: it can be waited for, recorded on, and entered."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0
        self.device = _CPU

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


class Event:
    """A moment that has always passed already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _is_cuda_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def _to_cpu(value: Any) -> Any:
    return _CPU if _is_cuda_device(value) else value


class CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in the arguments of torch calls to the CPU.

    And lets `tensor.type()` answer as a CUDA tensor would: megatron-core's optimizers ask it.
    """

    def __torch_function__(self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.device:
            return _to_cpu(func(*args, **kwargs))
        if any(map(_is_cuda_device, args)) or _is_cuda_device(kwargs.get("device")):
            args = tuple(map(_to_cpu, args))
            kwargs = {key: _to_cpu(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _answer(value: Any) -> Callable:
    """A function that returns `value` whatever it is asked.

    A new one each time: torch.compile's tables refuse one function under two names.
    """
    return lambda *_, **__: value


@contextlib.contextmanager
def _in_stream(_: Any):
    yield


def _install_cuda_namespace() -> None:
    """Give `torch.cuda` the answers of a host whose only device is the CPU. `torch.cuda.is_available()` stays false."""
    cuda = torch.cuda
    cuda.current_device = _answer(_CPU)
    cuda.Stream, cuda.Event, cuda.stream = Stream, Event, _in_stream
    cuda.current_stream, cuda.default_stream = _answer(Stream()), _answer(Stream())
    cuda.is_current_stream_capturing = _answer(False)
    cuda.get_device_capability = _answer((0, 0))
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
        "set_stream",
        "ipc_collect",
    ):
        setattr(cuda, name, _answer(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _answer(0))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = cuda.random.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _answer(None), _answer(None)
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.Tensor.record_stream = _answer(None)


def _install_collectives() -> None:
    """gloo wants split sizes as lists, and parts of one size. megatron-core's expert dispatcher passes numpy arrays; it
    gathers as many tokens of each rank as came to it.
    """
    _install_uneven_parts()
    original = torch.distributed.all_to_all_single

    @functools.wraps(original)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        def as_list(sizes):
            return None if sizes is None else [int(size) for size in sizes]

        return original(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), group=group, async_op=async_op
        )

    torch.distributed.all_to_all_single = all_to_all_single


def _install_uneven_parts() -> None:
    """Gather and scatter parts that differ in their first dimension, as NCCL does."""
    gather, scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    @functools.wraps(gather)
    def all_gather(tensor_list, tensor, group=None, async_op=False):
        longest = max((len(part) if part.ndim else 0 for part in tensor_list), default=0)
        if async_op or tensor.ndim == 0 or all(len(part) == longest for part in tensor_list):
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        everyone = [torch.empty_like(padded) for _ in tensor_list]
        gather(everyone, padded, group=group)
        for part, found in zip(tensor_list, everyone):
            part.copy_(found[: len(part)])
        return None

    @functools.wraps(scatter)
    def reduce_scatter(output, input_list, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
        sizes = [len(part) if part.ndim else 0 for part in input_list]
        if async_op or len(set(sizes)) == 1:
            return scatter(output, input_list, op=op, group=group, async_op=async_op)
        everything = torch.cat(list(input_list))
        torch.distributed.all_reduce(everything, op=op, group=group)
        output.copy_(everything.split(sizes)[torch.distributed.get_rank(group)])
        return None

    torch.distributed.all_gather, torch.distributed.reduce_scatter = all_gather, reduce_scatter


def _share_gloo_devices() -> None:
    """One gloo device for all process groups of this process. Each device has a thread that wakes a hundred times a
    second, groups that are gone keep theirs, and a job has some thirty groups: on a small machine that is a third of
    its time. A group that is made with options of its own keeps to them.
    """
    gloo = torch.distributed.ProcessGroupGloo
    make, devices = gloo.__init__, {}

    def make_with_shared_device(self, store, rank, size, *options, timeout=None, **more) -> None:
        if options or more or timeout is None:
            make(self, store, rank, size, *options, **more, **({} if timeout is None else {"timeout": timeout}))
            return
        key = (os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME"))  # threads do not follow into a forked process
        if key not in devices:
            interface = (key[1] or "").split(",")[0]
            devices[key] = gloo.create_device(interface=interface) if interface else gloo.create_default_device()
        shared = gloo._Options()
        shared._devices, shared._timeout = [devices[key]], timeout
        make(self, store, rank, size, shared)

    gloo.__init__ = make_with_shared_device


def _torch_on_cpu() -> types.ModuleType:
    """A view of the module `torch` whose tensor factories read device="cuda" as the CPU; all else is torch itself."""
    view = types.ModuleType("torch")
    view.__getattr__ = lambda name: getattr(torch, name)  # PEP 562: what the view does not define comes from torch

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return make

    for name in _FACTORIES:
        setattr(view, name, on_cpu(getattr(torch, name)))
    return view


def _patch_megatron() -> None:
    """The places in megatron-core that the answers above do not reach."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as random_state
    from megatron.core.transformer.moe import moe_utils

    # The tracker of random states talks to torch._C, not to torch.cuda.
    random_state._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random_state._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # Here both are one generator, so that draws "change the CPU state within the GPU context" is how it should be.
    logging.getLogger(random_state.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    # Tensors made with device="cuda" amid forward and backward: the schedules' token counters, the router's losses.
    schedules.torch = moe_utils.torch = _torch_on_cpu()
    _patch_hybrid_optimizer()


class _OnHost(torch.Tensor):
    """A tensor in host memory, where all others pass for tensors on a device."""

    is_cuda = False


def _patch_hybrid_optimizer() -> None:
    """Let the optimizer that keeps its state in host memory tell the device's parameters from its copies of them: all
    are on the CPU here, and it asks which are not, once.
    """
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    original = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    @functools.wraps(original)
    def with_a_device(self: HybridDeviceOptimizer, fraction: float) -> tuple:
        with mock.patch.multiple(
            torch.Tensor,
            create=True,
            is_cuda=True,
            pin_memory=lambda tensor, *_: tensor.as_subclass(_OnHost),
        ):
            return original(self, fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = with_a_device


def install() -> None:
    """Put the stand-in in place, for the life of the process."""
    _install_cuda_namespace()
    _install_collectives()
    _share_gloo_devices()
    _patch_megatron()
