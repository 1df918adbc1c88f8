"""The device, and what stands in for CUDA where there is none.

This package alone knows that megatron-core expects CUDA and NCCL. Call `install()` once, before megatron.core is
imported for the first time:
  - a Transformer Engine that cannot be imported, or has no GPU, is hidden from it (platform/te.py);
  - on a host with CUDA it selects this process's device;
  - elsewhere it makes `torch.cuda` mean the CPU for the calls that megatron-core makes (platform/cpu.py), and gloo
    stands in for NCCL;
  - what megatron-core leaves undefined where there is no Transformer Engine is defined (platform/no_te.py).

Everything above asks `device()`, `backend()` and the functions here, and never writes "cuda".
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from megatron_dlm.config.errors import ConfigError

_installed = False


def is_cuda() -> bool:
    """Whether this host has a CUDA device that torch can use."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: cuda:LOCAL_RANK, or the CPU."""
    if not is_cuda():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def backend() -> str:
    """Name of the torch.distributed backend that moves tensors of `device()`."""
    return "nccl" if is_cuda() else "gloo"


def install() -> None:
    """Make this process ready for megatron-core. May be called any number of times; the first call counts."""
    global _installed
    if _installed:
        return
    from megatron_dlm.platform import no_te, te

    te.shield()
    if is_cuda():
        if device().index >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK is {device().index}, and this host has {torch.cuda.device_count()} devices. Start at most "
                "one process per device on each host."
            )
        torch.cuda.set_device(device())
    else:
        from megatron_dlm.platform import cpu

        cpu.install()
    no_te.install()
    _installed = True


@contextlib.contextmanager
def cuda_calls_on_cpu() -> Iterator[None]:
    """Within it, `device="cuda"` means the CPU, and CPU tensors name themselves as CUDA tensors.

    It intercepts every torch call (about 1.3 us each, measured on a 2-core host), so enter it around the construction
    of models and optimizers and around the optimizer step, not around forward and backward. On a CUDA host it does
    nothing.
    """
    if is_cuda():
        yield
        return
    from megatron_dlm.platform import cpu

    with cpu.CudaMeansCpu():
        yield


def synchronize() -> None:
    """Wait until the device has done what was queued. Nothing is queued on a CPU."""
    if is_cuda():
        torch.cuda.synchronize()
