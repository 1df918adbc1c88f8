"""What attention kernels from other packages have in common: they may be missing, and they serve some models only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.rollout.kv_cache import CacheShape

FLAG = "--rollout-attention-backend"
_SHORT = (torch.bfloat16, torch.float16)


def load(module: str, library: str, flag: str) -> ModuleType:
    """Import an optional module.

    Args:
        library: its name in a sentence. flag: the value of --rollout-attention-backend that asks for it.

    Raises:
        DependencyError: it is missing, or does not work with what is installed here.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise DependencyError(
                f"{FLAG} {flag} needs {library}, which is not installed. Install it, or use another backend."
            ) from None
        reason: Exception = error
    except Exception as error:  # a kernel library built for another torch or CUDA: whatever its loader says
        reason = error
    said = str(reason).partition("\n")[0]
    raise DependencyError(f"{FLAG} {flag} needs {library}, which cannot be imported here ({said}). Reinstall it.")


def check_device(device: torch.device, library: str, oldest: tuple[int, int], before: tuple[int, int] | None) -> None:
    """Refuse a CPU, and a GPU that a library has no kernels for.

    Args:
        oldest, before: compute capabilities; from the one on, and older than the other.

    Raises:
        ConfigError: it is one of these.
    """
    if device.type != "cuda":
        raise ConfigError(f"{library} runs on GPUs only, and this is a CPU. Use {FLAG} auto.")
    found = torch.cuda.get_device_capability(device)
    if found < oldest or (before is not None and found >= before):
        raise ConfigError(
            f"{library} has no kernels for this GPU, of compute capability {found[0]}.{found[1]}. Use {FLAG} auto."
        )


def check_sizes(shape: CacheShape, library: str, dim_fits: Callable[[int], bool], dims: str) -> None:
    """Refuse a dtype other than bfloat16 and float16, and heads of another width than `dims` says.

    Raises:
        ConfigError: it is one of these.
    """
    if shape.dtype not in _SHORT:
        name = str(shape.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{library} computes in bfloat16, and this model is kept in {name}. Give --bf16, or {FLAG} auto."
        )
    if not dim_fits(shape.head_dim):
        raise ConfigError(
            f"{library} has kernels for heads of {dims}, and those of this model are {shape.head_dim} wide. Use "
            f"{FLAG} auto."
        )
