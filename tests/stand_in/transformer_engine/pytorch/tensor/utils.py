"""What megatron-core's optimizer and buffers do to weights in FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import LARGEST, QuantizedTensor


def replace_raw_data(tensor: QuantizedTensor, new_raw_data: Tensor) -> None:
    new_raw_data.detach().copy_(tensor._data)
    tensor._data = new_raw_data


def cast_master_weights_to_fp8(
    model_weights: list[QuantizedTensor],
    master_weights: list[Tensor | None],
    start_offsets: list[int | None],
    group: Any,
    manual_post_all_gather_processing: bool = False,
) -> None:
    """Each rank writes its shard; what scales a weight is its largest number on any rank."""
    if not manual_post_all_gather_processing:
        raise NotImplementedError
    for weight, master, start in zip(model_weights, master_weights, start_offsets):
        largest = torch.zeros(()) if master is None else master.abs().max()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        scale = LARGEST / max(largest.item(), 1e-12)
        weight.put(torch.empty(0) if master is None else master.to(weight.dtype), scale, start or 0)


def post_all_gather_processing(model_weights: list[QuantizedTensor]) -> None:
    """All shards are here."""
    for weight in model_weights:
        weight.follow()
