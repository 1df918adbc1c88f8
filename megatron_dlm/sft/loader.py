"""Who prepares the rows of fine-tuning, and hands them to the device.

    loader = open_loader(updates, sft, device)
    update = next(loader)                         # its rows are on the device
    loader.close()

  InProcess       the training process itself, when an update is asked for
  Ahead           one more process, by torch's DataLoader: rows are ready, in pinned memory, when they are asked for
  DaliLoader      such a process before a pipeline of NVIDIA DALI, which has rows on the device already when they are
                  asked for (sft/loader_dali.py)

One process is enough, and as many as there can be: a run's place in its data is that behind the update before, so
updates are prepared one after the other.

Invariant (tests/sft/test_loader.py, test_loader_dali.py): all of them hand over the same updates, bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from megatron_dlm import platform
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.diffusion.layout import moved
from megatron_dlm.sft.ahead import DEPTH, Prepared, end, opened, received_from, starting
from megatron_dlm.sft.updates import Update, Updates


class Loader(Protocol):
    """Updates without end, with their rows on the device."""

    def __iter__(self) -> Loader: ...

    def __next__(self) -> Update: ...

    def close(self) -> None:
        """End what prepares rows. May be called again."""


class InProcess:
    """Prepares each update when it is asked for."""

    def __init__(self, updates: Updates, device: torch.device) -> None:
        self._updates, self._device = updates, device

    def __iter__(self) -> InProcess:
        return self

    def __next__(self) -> Update:
        update = next(self._updates)
        return dataclasses.replace(update, rows=[row.to(self._device) for row in update.rows])

    def close(self) -> None:
        """Nothing is left to end."""


class Ahead:
    """A process prepares the next updates meanwhile."""

    def __init__(self, updates: Updates, device: torch.device) -> None:
        self._device = device
        loader = DataLoader(
            Prepared(updates),
            batch_size=None,
            num_workers=1,
            prefetch_factor=DEPTH,
            collate_fn=_as_it_is,
            pin_memory=device.type != "cpu",
            multiprocessing_context="spawn",  # a process with CUDA, or with gloo's threads, cannot be forked
            generator=torch.Generator(),  # otherwise it would draw from that of the training
        )
        with starting() as self.processes:
            self._parcels: Any = iter(loader)

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Update:
        buffer, label = next(self.parcels())
        return opened(moved(buffer, self._device), label)

    def parcels(self) -> Iterator[tuple[torch.Tensor, bytes]]:
        """The updates from here on as they come from the process, on the host (sft/parcel.py)."""
        while True:
            with received_from(self.processes):
                parcel = next(self._parcels)
            yield parcel

    def close(self) -> None:
        self._parcels = None  # DataLoader ends its process when its iterator goes
        end(self.processes)


def _as_it_is(parcel: tuple[torch.Tensor, bytes]) -> tuple[torch.Tensor, bytes]:
    return parcel


def num_processes(sft: SFTConfig) -> int:
    """Processes that prepare rows beside the training process, 0 or 1."""
    if sft.num_workers is not None:
        return sft.num_workers
    return 1 if platform.is_cuda() or sft.dataloader_type == "dali" else 0


def check_loader(sft: SFTConfig) -> None:
    """
    Raises:
        DependencyError: DALI is asked for, and is not here.
    """
    if sft.dataloader_type != "dali":
        return
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"--dataloader-type dali needs NVIDIA DALI, which cannot be imported here ({error}). Run: pip install "
            "nvidia-dali-cuda120 (with CUDA 13: nvidia-dali-cuda130), or leave the flag out: the rows are the same."
        ) from None


def open_loader(updates: Updates, sft: SFTConfig, device: torch.device) -> Loader:
    """The loader that the settings ask for.

    Args:
        updates: those that come next; they belong to the loader from now on.
    """
    if sft.dataloader_type == "dali":
        from megatron_dlm.sft.loader_dali import DaliLoader

        return DaliLoader(updates, device, num_processes(sft))
    return Ahead(updates, device) if num_processes(sft) else InProcess(updates, device)
