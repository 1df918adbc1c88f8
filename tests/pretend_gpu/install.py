"""Puts the pretended GPU in place of CUDA."""

from __future__ import annotations

import collections
import functools
import importlib.machinery
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_iter

from tests.pretend_gpu.tensors import Devices, Graph, OnGpu, asking, capture, capturing, gpu, kernel, on_gpu, plain
from tests.rollout import fake_kernels

_backends: dict[Any, str] = {}  # process group, or None for the world's: what it should be made of


def _module_to_gpu(module: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
    """torch.nn.Module.cuda; parameters get new objects, because one cannot become of another type."""
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_cuda and not isinstance(tensor, OnGpu):
                    continue  # of a kind that holds others
                if tensor is not None and id(tensor) not in moved:
                    new = on_gpu(plain(tensor.detach()).clone()).requires_grad_(tensor.requires_grad)
                    new.__dict__.update(tensor.__dict__)
                    new._is_param = isinstance(tensor, torch.nn.Parameter)
                    moved[id(tensor)] = new
                if tensor is not None:
                    table[name] = moved[id(tensor)]
    return module


def _module_to(to: Callable, module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """torch.nn.Module.to, over torch's own."""
    device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
    if device is None or device.type != "cuda":
        return to(module, *args, **kwargs)
    return _module_to_gpu(module if dtype is None else to(module, dtype))


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
    dist.ProcessGroup.allgather_into_tensor_coalesced = _gather_each
    # What the two enclose has been done one by one.
    dist.ProcessGroup._start_coalescing = lambda *_: None
    dist.ProcessGroup._end_coalescing = lambda *_: types.SimpleNamespace(wait=lambda: True)
    one = dist.P2POp
    one.__new__ = lambda cls, *_, **__: object.__new__(cls)
    make = one.__init__
    one.__init__ = lambda self, op, *args, **kwargs: make(self, getattr(op, "__wrapped__", op), *args, **kwargs)


def _gather_each(group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_: Any) -> Any:
    """gloo gathers tensors of different types together as if they were of one."""
    for output, tensor in zip(outputs, inputs):
        done = group._allgather_base(output, tensor)
        done.wait()
    return done


def _checked(name: str, collective: Callable) -> Callable:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or next((one for one in args if isinstance(one, dist.ProcessGroup)), None)
        wanted = _backends.get(group, _backends[None])
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and isinstance(tensor, OnGpu) != (wanted == "nccl"):
                raise RuntimeError(f"{name} of a tensor on {tensor.device} in a group of {wanted}: {asking()}")
        return collective(*args, **kwargs)

    return call


def _install_cuda() -> None:
    from megatron_dlm.platform import cpu

    tensor_cuda = torch.Tensor.cuda
    cpu._install_cuda_namespace()
    torch.Tensor.cuda, torch.nn.Module.cuda = tensor_cuda, _module_to_gpu
    to = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *args, **kwargs: _module_to(to, module, *args, **kwargs)
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.Tensor.is_pinned = lambda *_: True
    cuda = torch.cuda
    figures = dict(name="a GPU of the mind", total_memory=2**34, major=9, minor=0, multi_processor_count=132)
    properties = type("Properties", (), figures)
    for name, answer in dict(
        is_available=True,
        is_initialized=True,
        is_bf16_supported=True,
        device_count=8,
        get_device_capability=(9, 0),
        get_device_properties=properties,
        get_device_name=properties.name,
        mem_get_info=(2**34, 2**34),
        max_memory_allocated=1,  # by which programs divide
        memory_stats=collections.defaultdict(int),
        graph_pool_handle=(0, 0),
    ).items():
        setattr(cuda, name, functools.partial(lambda value, *_, **__: value, answer))
    cuda.current_device = lambda: gpu().index
    cuda._lazy_init = lambda: None
    torch.accelerator.is_available = lambda: False  # by whom a data loader has its batches pinned
    cuda.CUDAGraph, cuda.graph = Graph, capture
    cuda.is_current_stream_capturing = capturing
    cuda.memory._record_memory_history = lambda *_, **__: None
    torch.version.cuda = "13.0"
    generator = torch.Generator
    answers = {
        "__call__": lambda _, device="cpu": generator(),
        "__instancecheck__": lambda _, one: isinstance(one, generator),
    }
    torch.Generator = type("OfTheCpu", (type,), answers)("Generator", (), {})
    cpu._install_collectives()
    cpu._share_gloo_devices()


def _flex_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: Any, scale: float, enable_gqa: bool
) -> torch.Tensor:
    """torch's, by the rule of its mask alone."""
    steps = [torch.arange(size, device=q.device) for size in (*q.shape[:3], k.shape[2])]
    row, head, query, key = torch.meshgrid(*steps, indexing="ij")
    visible = block_mask.mask_mod(row, head, query, key)
    return F.scaled_dot_product_attention(
        *(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)), visible, scale=scale, enable_gqa=enable_gqa
    )


def _scaled_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """torch's with a scale for each row, which not every torch has on a CPU: [T, K], [K, N], [T, 1], [1, N]."""
    (tokens, width), outputs = x.shape, weight.shape[1]
    if (x_scale.shape, weight_scale.shape) != ((tokens, 1), (1, outputs)):
        raise RuntimeError(f"scales {tuple(x_scale.shape)} and {tuple(weight_scale.shape)} are not one for each row")
    if not (x.is_contiguous() and weight.t().is_contiguous() and x_scale.is_contiguous()):
        raise RuntimeError("cuBLAS reads rows of the one and columns of the other")
    if width % 16 or outputs % 16 or out_dtype is not torch.bfloat16:
        raise RuntimeError(
            f"{tuple(x.shape)} times {tuple(weight.shape)} to {out_dtype}: not multiples of 16, or no bf16"
        )
    return (x.float() @ weight.float() * x_scale * weight_scale).to(out_dtype)


def _install_kernels() -> None:
    """Ways on the CPU for what is compiled for a GPU."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    import torch._dynamo

    torch._dynamo.config.disable = True
    from megatron_dlm.model.attention_flex import FlexAttention
    from megatron_dlm.rollout.attention import flex as rollout_flex

    FlexAttention._on_gpu = FlexAttention._on_cpu
    rollout_flex._kernel = lambda device: kernel(_flex_attention)
    torch._scaled_mm = kernel(_scaled_mm)
    flash = fake_kernels.flash_attn_interface()
    flash.flash_attn_with_kvcache = kernel(flash.flash_attn_with_kvcache)
    flash.__spec__ = importlib.machinery.ModuleSpec(flash.__name__, None)  # who looks whether it is there finds it
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
    logger = logging.getLogger(random_state.__name__)
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())  # it is that of the GPU
    if "transformer_engine_torch" in sys.modules:  # megatron-core imports it wherever it is
        from tests.pretend_gpu import te_kernels

        te_kernels.install()
    run = graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with Devices():  # torch takes the mode away while it handles torch.autograd.backward
            return run(*args, **kwargs)

    graph._engine_run_backward = torch.autograd._engine_run_backward = backward
    Devices().__enter__()
