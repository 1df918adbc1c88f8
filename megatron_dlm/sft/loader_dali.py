"""Rows of fine-tuning through NVIDIA DALI (--dataloader-type dali).

    process beside it: Updates -> parcels  =>  pipeline: host -> device, ahead of the training  =>  views of the parcel

DALI's batches are of samples with one shape each, and an update has rows as its samples ask for. So a batch is one
parcel: all tensors of an update in one run of bytes, and a label that stays on the host (sft/parcel.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from megatron_dlm.sft.ahead import DEPTH, Prepared, end, opened, received_from, starting
from megatron_dlm.sft.updates import Update, Updates


class Batches:
    """Parcels as DALI takes them: batches of one sample, uint8 arrays."""

    def __init__(self, updates: Updates) -> None:
        self._prepared = Prepared(updates)

    def __iter__(self) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
        for buffer, label in self._prepared:
            yield [buffer.numpy()], [np.frombuffer(label, np.uint8)]


class DaliLoader:
    """Updates from a DALI pipeline, on its device when they are asked for.

    Args:
        processes: that prepare updates, 1 or 0; where there is none the pipeline asks for them in this process.
    """

    def __init__(self, updates: Updates, device: torch.device, processes: int = 1) -> None:
        self._on_host = device.type == "cpu"
        pipeline = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=None if self._on_host else device.index,
            prefetch_queue_depth=DEPTH,
            exec_dynamic=True,  # what it hands out is ours as long as we hold it
            py_num_workers=1,
            py_start_method="spawn",
        )
        ahead = dict(parallel=True, prefetch_queue_depth=DEPTH) if processes else {}
        with pipeline:
            buffer, label = fn.external_source(
                source=Batches(updates), num_outputs=2, dtype=types.UINT8, ndim=1, batch=True, **ahead
            )
            pipeline.set_outputs(buffer if self._on_host else buffer.gpu(), label)
        with starting() as self._processes:
            pipeline.build()
        self._pipeline: Any = pipeline
        self._lent: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def __iter__(self) -> DaliLoader:
        return self

    def __next__(self) -> Update:
        self._take_back()
        with received_from(self._processes):
            buffer, label = self._pipeline.run()
        label = np.asarray(label[0]).tobytes()
        if self._on_host:  # these are pages that it shares with the other process, and uses again
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
        self._pipeline = None  # DALI ends its process when the pipeline goes
        end(self._processes)
