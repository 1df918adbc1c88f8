"""The attention backends of packed rows by name, and which one a model gets.

  - dense: torch's attention under a dense mask per group; exact on every device, the oracle of the other one;
  - flex: FlexAttention over the whole row, which computes no tile that nobody sees.

`auto` is flex on a GPU where it can serve the model, and dense elsewhere; a training session also tries it out
(training/setup.py), and takes dense where it does not work.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError, DependencyError, UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.rows import Row
from megatron_dlm.model.attention import ContextAttention, DenseAttention
from megatron_dlm.model.attention_flex import FlexAttention
from megatron_dlm.model.row_params import Attention

FLAG = "--attention-backend"
KINDS = {"dense": DenseAttention, "flex": FlexAttention}
_NARROWEST = 16  # head that torch compiles a kernel for


def attention_of(row: Row, group: dist.ProcessGroup, backend: str = "dense", more_to_come: bool = False) -> Attention:
    """The attention of a row, or of a part of one whose other parts are on the other ranks of `group`.

    Args:
        backend: one of KINDS.
        more_to_come: a later virtual stage of this process will ask for the same; the row keeps it until then.
    """
    made = row.made.pop(backend, None)
    if made is None:
        kind = KINDS[backend]
        made = kind(row.layout) if row.context is None else ContextAttention(row.layout, row.context, group, kind)
    if more_to_come:
        row.made[backend] = made
    return made


def served(name: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    """The backend of that name for a model, which is not `auto` any more.

    Raises:
        ConfigError, DependencyError: it cannot serve the model on this device.
    """
    if name == "auto":
        return "flex" if device.type == "cuda" and _refusal(dtype, head_dim, device) is None else "dense"
    refusal = _refusal(dtype, head_dim, device) if name == "flex" else None
    if refusal is not None:
        raise refusal
    return name


def check_attention(parallel: ParallelConfig, model: ModelConfig) -> str:
    """Refuse a backend that cannot serve this model on this process's device, before anything is built.

    Args:
        model: resolved.

    Returns: the backend, which is not `auto` any more.

    Raises:
        ConfigError, DependencyError: it cannot.
    """
    return served(parallel.attention_backend, dtype_of(model), model.kv_channels, platform.device())


def dtype_of(model: ModelConfig) -> torch.dtype:
    """What a model's parameters are kept in."""
    return torch.bfloat16 if model.bf16 else torch.float64 if model.fp64 else torch.float32


def _refusal(dtype: torch.dtype, head_dim: int, device: torch.device) -> UserError | None:
    """Why FlexAttention cannot serve a model here. On a CPU it can: its mask is written out there."""
    if device.type != "cuda":
        return None
    if dtype == torch.float64:
        return ConfigError(f"{FLAG} flex does not compute in float64 on a GPU. Leave out --fp64, or use {FLAG} dense.")
    if head_dim < _NARROWEST:
        return ConfigError(
            f"{FLAG} flex has no kernels for heads of {head_dim}; they must be {_NARROWEST} wide or wider. Use {FLAG} "
            "dense."
        )
    if importlib.util.find_spec("triton") is None:
        return DependencyError(f"{FLAG} flex needs Triton, which is not installed. Install it, or use {FLAG} dense.")
    return None
