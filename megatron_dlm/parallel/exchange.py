"""Move Python objects between ranks.

Objects travel pickled, in one collective per call after their sizes: prompts, rewards and traces, a few megabytes at
most. Every function is collective over its group and names ranks by their place in that group. Tensors that are inside
objects should be on the CPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dlm import platform


def gather_objects(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, obj, group=group)
    return gathered


def broadcast_object(obj: Any, src: int, group: dist.ProcessGroup | None = None) -> Any:
    """The object that rank `src` of the group passed; what the others pass is ignored."""
    box = [obj]
    source = src if group is None else dist.get_global_rank(group, src)
    dist.broadcast_object_list(box, src=source, group=group, device=platform.device())
    return box[0]


def broadcast_integers(values: Sequence[int], src: int, group: dist.ProcessGroup) -> list[int]:
    """The integers that rank `src` of the group passed; the others pass as many."""
    numbers = torch.tensor(values, dtype=torch.int64, device=platform.device())
    dist.broadcast(numbers, src=dist.get_global_rank(group, src), group=group)
    return numbers.tolist()


def anywhere(*marks: bool) -> list[bool]:
    """For each mark, whether it is set on any rank. Collective.

    Clocks and signals differ between ranks; what a run does next must not.
    """
    found = torch.tensor(marks, dtype=torch.int32, device=platform.device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(mark) for mark in found.tolist()]


def most_anywhere(*values: int) -> list[int]:
    """The largest of each value over all ranks. Collective."""
    found = torch.tensor(values, dtype=torch.int64, device=platform.device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def exchange_objects(outgoing: Mapping[int, Sequence[Any]], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Send each rank its own list of objects.

    Args:
        outgoing: destination rank -> objects for it; a rank that is not named gets none. A rank may send to itself.

    Returns:
        The objects sent to this rank, by rank of the sender, each sender's in the order in which it gave them.
    """
    size, device = dist.get_world_size(group), platform.device()
    if not all(0 <= rank < size for rank in outgoing):
        raise ValueError(f"destinations {sorted(outgoing)} are not all ranks of a group of {size}")
    parcels = [pickle.dumps(list(outgoing.get(rank, ())), protocol=pickle.HIGHEST_PROTOCOL) for rank in range(size)]
    send_sizes = torch.tensor([len(parcel) for parcel in parcels], dtype=torch.int64, device=device)
    receive_sizes = torch.empty_like(send_sizes)
    dist.all_to_all_single(receive_sizes, send_sizes, group=group)
    lengths = receive_sizes.tolist()
    sent = torch.frombuffer(bytearray(b"".join(parcels)), dtype=torch.uint8).to(device)
    received = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        received, sent, output_split_sizes=lengths, input_split_sizes=send_sizes.tolist(), group=group
    )
    return [obj for parcel in received.cpu().split(lengths) for obj in pickle.loads(parcel.numpy().tobytes())]
