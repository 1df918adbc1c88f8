"""Rows of fine-tuning through NVIDIA DALI (--dataloader-type dali).

    process beside it: Updates -> parcels  =>  pipeline: host -> device, ahead of the training  =>  views of the parcel

DALI's batches are of samples with one shape each, and an update has rows as its samples ask for. So a batch is one
parcel: all tensors of an update in one run of bytes, and a label that stays on the host (sft/parcel.py).

The process beside it is that of the default loader. DALI has processes of its own (a parallel external source), but
when one is killed while it waits for work, its parent waits for it for ever: seen with 2.4, in a lock that both share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from megatron_dlm.sft.ahead import DEPTH, Prepared, opened
from megatron_dlm.sft.loader import Ahead
from megatron_dlm.sft.updates import Update, Updates


class Batches:
    """Parcels as DALI takes them: batches of one sample, uint8 arrays."""

    def __init__(self, parcels: Iterable[tuple[torch.Tensor, bytes]]) -> None:
        self._parcels = parcels

    def __iter__(self) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
        for buffer, label in self._parcels:
            yield [buffer.numpy()], [np.frombuffer(label, np.uint8)]


class DaliLoader:
    """Updates from a DALI pipeline, on its device when they are asked for.

    Args:
        processes: that prepare updates, 1 or 0; where there is none the pipeline asks for them in this process.
    """

    def __init__(self, updates: Updates, device: torch.device, processes: int = 1) -> None:
        self._on_host = device.type == "cpu"
        self._lent: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._ahead = Ahead(updates, torch.device("cpu")) if processes else None
        pipeline = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=None if self._on_host else device.index,
            prefetch_queue_depth=DEPTH,
            exec_dynamic=True,  # what it hands out is ours as long as we hold it
        )
        source = Batches(self._ahead.parcels() if self._ahead else Prepared(updates))
        with pipeline:
            buffer, label = fn.external_source(source=source, num_outputs=2, dtype=types.UINT8, ndim=1, batch=True)
            pipeline.set_outputs(buffer if self._on_host else buffer.gpu(), label)
        self._pipeline: Any = pipeline

    def __iter__(self) -> DaliLoader:
        return self

    def __next__(self) -> Update:
        self._take_back()
        buffer, label = self._pipeline.run()
        label = np.asarray(label[0]).tobytes()
        if self._on_host:
            return opened(torch.from_numpy(np.array(buffer[0])), label)
        self._lent.append((torch.from_dlpack(buffer[0]), torch.cuda.Event()))
        return opened(self._lent[-1][0], label)

    def _take_back(self) -> None:
        """Let the buffer of the update before the last go. DALI knows nothing of kernels that still read it, so it is
        held until those are done that were launched before its successor was asked for.
        """
        if self._lent:
            self._lent[-1][1].record()
        if len(self._lent) > 1:
            self._lent[0][1].synchronize()
            del self._lent[0]

    def close(self) -> None:
        if self._lent:
            torch.cuda.synchronize()
            self._lent = []
        self._pipeline = None
        if self._ahead is not None:
            self._ahead.close()
