"""Buckets of weights in the child: from what the trainer shares to the payloads that SGLang's workers read (child).

A bucket is one run of bytes. On the CPU both processes map it. On CUDA it lies on the trainer's devices, one copy for
each worker, and what comes here are its IPC handles: they go on to the workers as they are, so this process needs no
CUDA of its own, and each handle is opened once.
"""

from __future__ import annotations

import base64
import mmap
from typing import Any

import torch


def payloads(tensors: list[dict[str, Any]], buffers: dict[str, Any], workers: int) -> list[str]:
    """One payload per worker, for update_weights_from_tensor with load_format 'flattened_bucket'.

    Args:
        tensors: name, dtype, shape and place (start, end) in the bucket of each.
        buffers: {'fd', 'bytes'} of a mapped bucket, or {'handles'}: one per worker.
    """
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    metadata = [
        FlattenedTensorMetadata(
            name=one["name"],
            shape=torch.Size(one["shape"]),
            dtype=getattr(torch, one["dtype"]),
            start_idx=one["start"],
            end_idx=one["end"],
            numel=one["end"] - one["start"],
        )
        for one in tensors
    ]
    if "handles" in buffers:
        flats: list[Any] = [CudaHandle(handle) for handle in buffers["handles"]]
    else:
        flats = [mapped(buffers["fd"], buffers["bytes"])] * workers
    if len(flats) != workers:
        raise ValueError(f"{len(flats)} handles for {workers} workers")
    return [
        MultiprocessingSerializer.serialize({"flattened_tensor": flat, "metadata": metadata}, output_str=True)
        for flat in flats
    ]


def mapped(fd: int, size: int) -> torch.Tensor:
    """The first bytes of a shared memory file, uint8 [size]: a copy, because the trainer fills the file again."""
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
        return torch.frombuffer(bytearray(view[:size]), dtype=torch.uint8)


class CudaHandle:
    """Stands for a CUDA tensor of another process until it is unpickled in a third one.

    Args:
        handle: of `handle_of`.
    """

    def __init__(self, handle: list[Any]) -> None:
        self.handle = handle

    def __reduce__(self) -> tuple:
        from sglang.srt.utils import patch_torch

        plain = [base64.b64decode(one["bytes"]) if isinstance(one, dict) else one for one in self.handle]
        size, stride, offset, device, memory, storage_size, storage_offset, counter, counter_offset, event, wait = plain
        return patch_torch._rebuild_cuda_tensor_modified, (
            *(torch.Tensor, torch.Size(size), tuple(stride), offset, torch.storage.TypedStorage, torch.uint8, device),
            *(memory, storage_size, storage_offset, False, counter, counter_offset, event, wait),
        )


def handle_of(flat: torch.Tensor) -> list[Any]:
    """Of a uint8 CUDA tensor, as plain data; called by the trainer, which keeps the tensor until it was read."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(flat)
    _, size, stride, offset, _, _, _, memory, storage_size, storage_offset, _, counter, counter_offset, event, wait = (
        arguments
    )
    uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
    plain = [list(size), list(stride), offset, uuid, memory, storage_size, storage_offset]
    plain += [counter, counter_offset, event, wait]
    return [{"bytes": base64.b64encode(one).decode()} if isinstance(one, bytes) else one for one in plain]
