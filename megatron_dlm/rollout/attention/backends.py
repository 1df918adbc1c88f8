"""The attention backends by name, and which one an engine gets.

On a CPU `auto` is sdpa. On a GPU it is the first of these that on every rank serves the model and agrees with sdpa on
a small pass:

  - FlashAttention 3: reads pages of any size in place, and fills the tensor cores of a Hopper best;
  - FlashInfer: reads them in place too, on later GPUs as well, but plans each pass on the host;
  - FlashAttention 2: the same kernels' ancestor, with pages of 256 tokens, so more of the cache lies idle;
  - sdpa: gathers pages, and computes what it then masks.

FlexAttention (flex) is not among them: one gets it by name. It computes no tile that nobody sees, but the four queries
of a block take a tile of 128, and torch compiles some kernels, for seconds each, before the first token. Whether it or
sdpa is faster has not been measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_dlm.config.errors import ConfigError, DependencyError, UserError
from megatron_dlm.model.row_params import Attention
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.parallel.meeting import speaks
from megatron_dlm.rollout.attention import flash, flashinfer, flex
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.attention.sdpa import GatheredAttention
from megatron_dlm.rollout.attention.self_test import agrees
from megatron_dlm.rollout.kv_cache import BlockKVCache, CacheShape

Backend = Callable[[BlockKVCache, Queries], Attention]
"""Prepares the attention of one pass, for all its layers."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A backend before it is built.

    Attributes:
        check: raises a UserError that says why it cannot serve a cache of this shape on this device.
        build: makes the backend of one engine.
    """

    check: Callable[[CacheShape, torch.device], None]
    build: Callable[[], Backend]


KINDS: dict[str, Kind] = {
    "flash 3": Kind(flash.check_3, lambda: flash.Flash3),
    "flashinfer": Kind(flashinfer.check, flashinfer.FlashInfer),
    "flash 2": Kind(flash.check_2, lambda: flash.Flash2),
    "sdpa": Kind(lambda shape, device: None, lambda: GatheredAttention),
    "flex": Kind(flex.check, lambda: flex.FlexAttention),
}

BACKENDS: dict[str, tuple[str, ...]] = {
    "auto": ("flash 3", "flashinfer", "flash 2", "sdpa"),
    "sdpa": ("sdpa",),
    "flex": ("flex",),
    "flash": ("flash 3", "flash 2"),
    "flashinfer": ("flashinfer",),
}
"""The values of --rollout-attention-backend, and which kinds they allow, in the order in which these are asked."""


def backend(name: str, shape: CacheShape, device: torch.device) -> Backend:
    """The backend of an engine. On a GPU collective over the job, whose ranks get the same one: hosts may have other
    libraries, and engines that compute otherwise would generate otherwise. Where that decides, one line says so.

    Raises:
        ConfigError, DependencyError: none of that name can serve it on all ranks.
    """
    if device.type == "cpu" or name not in BACKENDS:
        return KINDS[served(name, shape, device)].build()
    refusal: UserError | None = None
    for kind in BACKENDS[name]:
        found, refusal = None, _refusal(kind, shape, device)
        if refusal is None:
            found = KINDS[kind].build()
            # A kernel library may be installed and still not work here: built for other GPUs, or unable to compile.
            if name == "auto" and kind != "sdpa" and not agrees(found, GatheredAttention, shape, device):
                refusal = DependencyError(f"{kind} does not compute here what sdpa does")
        refusals = gather_objects(refusal) if dist.is_initialized() else [refusal]
        if not any(refusals):
            return found
        rank, first = next((rank, one) for rank, one in enumerate(refusals) if one is not None)
        if not all(refusals) and speaks():
            said = f"Rollout attention is not {kind}, because rank {rank} cannot have it: {str(first).rstrip('.')}."
            tqdm.write(said, file=sys.stdout)
        refusal = refusal or first
    raise refusal


def served(name: str, shape: CacheShape, device: torch.device) -> str:
    """The first kind of that name that can serve a cache of this shape on this device. Builds nothing.

    Raises:
        ConfigError, DependencyError: there is none.
    """
    if name not in BACKENDS:
        raise ConfigError(f"There is no rollout attention backend {name}. Use one of {', '.join(BACKENDS)}.")
    if name == "auto" and device.type == "cpu":
        return "sdpa"
    refusal: UserError | None = None
    for kind in BACKENDS[name]:
        refusal = _refusal(kind, shape, device)
        if refusal is None:
            return kind
    raise refusal


def _refusal(kind: str, shape: CacheShape, device: torch.device) -> UserError | None:
    try:
        KINDS[kind].check(shape, device)
    except UserError as error:
        return error
    return None
