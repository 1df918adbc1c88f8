"""Memory of the device as torch's allocator sees it, and host memory that the device copies from and to quickly."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm import platform


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of this process on its device: in tensors now, in tensors at the worst moment since `restart_peak`, and
    taken from the device, in use or not.
    """

    allocated: int
    peak: int
    reserved: int


def usage() -> DeviceMemory | None:
    """What the allocator says; None on a CPU, where nobody counts."""
    if not platform.is_cuda():
        return None
    cuda = torch.cuda
    return DeviceMemory(cuda.memory_allocated(), cuda.max_memory_allocated(), cuda.memory_reserved())


def restart_peak() -> None:
    if platform.is_cuda():
        torch.cuda.reset_peak_memory_stats()


def give_back() -> None:
    """Give what no tensor uses back to the device, so that one large piece can be taken of it."""
    if platform.is_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def available() -> int:
    """Bytes that this process can still take on its device. On a CPU its processes share what the host has left."""
    if platform.is_cuda():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return _host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _host_memory() -> int:
    """Bytes of host memory that nobody uses, or only to cache files."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_buffer(nbytes: int) -> Tensor:
    """uint8 [nbytes] in host memory, pinned where there is a device to copy from."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=platform.is_cuda())
