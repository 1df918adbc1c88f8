"""Whether the kernels of this package that are written in Triton can run here.

They run on CUDA, and with TRITON_INTERPRET=1 (set before triton is imported for the first time) on a CPU, far too
slowly for anything but tests. triton is optional: who asks for it by name is told what is missing, who asks for 'auto'
gets torch's operations where it is.
"""

from __future__ import annotations

import os

import torch

from megatron_dlm.config.errors import DependencyError
from megatron_dlm.platform import device, is_cuda

_OLDEST = (3, 0)  # has a correctly rounded division
_OLDEST_GPU = (8, 0)  # computes in bfloat16


def by_triton(flag: str, choice: str) -> bool:
    """Whether kernels are to be used.

    Args:
        flag: that asks. choice: its value: 'torch', 'triton', or 'auto', which is triton on a GPU that can have it.

    Raises:
        DependencyError: triton was asked for by name, and cannot run here.
    """
    if choice == "torch" or (choice == "auto" and not is_cuda()):
        return False
    reason = missing()
    if reason is not None and choice == "triton":
        raise DependencyError(f"{flag} triton cannot run here, because {reason}. Use {flag} auto.")
    return reason is None


def missing() -> str | None:
    """Why Triton's kernels cannot run here, to stand behind 'because'; None if they can."""
    if not is_cuda() and os.environ.get("TRITON_INTERPRET") != "1":
        return "this host has no GPU"
    try:
        import triton
    except ModuleNotFoundError:
        return "the package triton is not installed"
    except Exception as error:  # built for another system: whatever its loader says
        return f"the package triton cannot be imported ({str(error).partition(chr(10))[0]})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"triton {triton.__version__} is older than {_OLDEST[0]}.{_OLDEST[1]}"
    if is_cuda():
        found = torch.cuda.get_device_capability(device())
        if found < _OLDEST_GPU:
            return f"a GPU of compute capability {found[0]}.{found[1]} is older than {_OLDEST_GPU[0]}.{_OLDEST_GPU[1]}"
    return None
