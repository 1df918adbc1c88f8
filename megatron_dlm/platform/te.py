"""Whether this machine can run Transformer Engine's layers, and FP8: what is missing, in one sentence.

An installation that does not fit the driver or torch may end the process that imports it, or raise what is no
ImportError; and megatron-core imports it wherever it is found, whatever the layers are. So it is imported in a process
of its own first, and one that cannot be is kept from megatron-core, as is any where there is no GPU. What was found
stands in the environment for the processes that this one starts.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
import subprocess
import sys

import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.parallel import PrecisionConfig

_NAME = "transformer_engine"
_FLAG = "--transformer-impl transformer_engine"
_LAYERS = (2, 0)
_RECIPES = {"delayed": (2, 0), "tensorwise": (2, 2), "blockwise": (2, 3), "mxfp8": (2, 1)}
"""Oldest release that megatron-core 0.16 takes a recipe from (megatron/core/fp8_utils.py)."""
_GATHER = (2, 2)
_CHIPS = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Lowest compute capability that has a recipe (transformer_engine/pytorch/quantization.py)."""
_BLOCKWISE_CUDA = (12, 9)
# torch first, as here: Transformer Engine finds some of the libraries that torch brings only where they are loaded.
_PROBE = "import torch, transformer_engine.pytorch, transformer_engine as te; print(te.__version__)"
_TOLD = "MEGATRON_DLM_TE"  # environment: host, GPUs, Python, installation; version, or why there is none
_PATIENCE = 300  # seconds; the first import after an installation reads some gigabytes


def require(wanted: PrecisionConfig) -> None:
    """Refuse layers that this machine cannot run. Nothing is looked at for the plain ones.

    Raises:
        DependencyError: no GPU, one without the recipe, no Transformer Engine, or one that does not load or is too old.
    """
    if wanted.transformer_impl == "local":
        return
    if not platform.is_cuda():
        raise DependencyError(f"{_FLAG} needs a GPU, and this host has none. Use --transformer-impl local.")
    check(wanted, torch.cuda.get_device_capability(), torch.version.cuda, installed())


def check(wanted: PrecisionConfig, chip: tuple[int, int], cuda: str, version: str) -> None:
    """The same for a GPU of this compute capability, this version of CUDA and this one of Transformer Engine."""
    needed = {_FLAG: _LAYERS}
    if wanted.fp8_format is not None:
        recipe = wanted.fp8_recipe
        flag = f"--fp8-recipe {recipe}"
        needed[flag] = _RECIPES[recipe]
        lowest = _CHIPS[recipe]
        if chip < lowest or (recipe == "mxfp8" and chip[0] >= 12):
            raise DependencyError(
                f"{flag} needs a GPU of compute capability {_dotted(lowest)} or more"
                f"{' and less than 12.0' if recipe == 'mxfp8' else ''}, and this one has {_dotted(chip)}. Use "
                f"{'another recipe' if chip >= (8, 9) else 'no --fp8-format'}."
            )
        if recipe == "blockwise" and _numbers(cuda) < _BLOCKWISE_CUDA:
            raise DependencyError(
                f"{flag} needs a torch of CUDA {_dotted(_BLOCKWISE_CUDA)} or newer, and this one is of {cuda}. Use "
                "tensorwise."
            )
        if wanted.fp8_param_gather:
            needed["--fp8-param-gather"] = _GATHER
    for flag, oldest in needed.items():
        if _numbers(version) < oldest:
            raise DependencyError(
                f"{flag} needs Transformer Engine {_dotted(oldest)} or newer, and {version} is installed. Install a "
                "newer one."
            )


def shield() -> None:
    """Hide a Transformer Engine that cannot be imported: from here on it is one that is not installed, except to
    `installed` and `hidden`. Call it before megatron-core's first import. Costs nothing where there is none; else as
    long as its import takes, once in a process and those that it starts.

    Without a GPU any is hidden, unless it was imported before: megatron-core would give its kernels tensors of the CPU.
    """
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is None:
        return
    if not platform.is_cuda() or _probe()[1] is not None:
        sys.modules[_NAME] = None  # an import of it raises ModuleNotFoundError


def hidden() -> str | None:
    """Why this process does without a Transformer Engine that is installed; None if that is not so."""
    return _probe()[1] if _NAME in sys.modules and sys.modules[_NAME] is None and _probe.cache_info().currsize else None


def found() -> tuple[str | None, str]:
    """The version that this process works with, None if it does without; and what is there, in words: a version, none,
    or one that does not load, and why.
    """
    if not _probe.cache_info().currsize and importlib.util.find_spec(_NAME) is None:
        return None, "none"
    version, reason = _probe()
    return (version, version) if reason is None else (None, f"one that cannot be imported ({reason})")


def installed() -> str:
    """The version of Transformer Engine, which can be imported.

    Raises:
        DependencyError: it cannot.
    """
    if not _probe.cache_info().currsize and importlib.util.find_spec(_NAME) is None:
        raise DependencyError(
            f"{_FLAG} needs Transformer Engine, which is not installed. Install transformer-engine[pytorch] with the "
            "extra for this CUDA (core_cu12 or core_cu13), or use --transformer-impl local."
        )
    version, reason = _probe()
    if reason is not None:
        raise DependencyError(
            f"Transformer Engine is installed and cannot be imported ({reason}). Install one that fits this torch, or "
            "use --transformer-impl local."
        )
    return version


@functools.cache
def _probe() -> tuple[str, str | None]:
    """The version that a process of its own has imported, and None; or nothing, and why it has not."""
    spec = importlib.util.find_spec(_NAME)
    gpus, place = os.environ.get("CUDA_VISIBLE_DEVICES", "all"), (spec and spec.origin) or ""
    here = [socket.gethostname(), gpus, sys.executable, place]
    told = os.environ.get(_TOLD, "").split("\n")
    if told[:4] != here or len(told) != 6:
        told = [*here, *_tried()]
        os.environ[_TOLD] = "\n".join(told)
    version, reason = told[4:]
    return version, None if version else reason


def _tried() -> tuple[str, str]:
    """The version, or why there is none; the other is empty."""
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return "", f"not within {_PATIENCE} seconds"
    if probe.returncode:
        return "", (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1][:200].rstrip(".")
    return probe.stdout.strip().splitlines()[-1], ""


def _numbers(version: str) -> tuple[int, int]:
    """`2.3.0.dev0+5fdd7bb` -> (2, 3)."""
    major, minor = (*version.split("+")[0].split("."), "0")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
