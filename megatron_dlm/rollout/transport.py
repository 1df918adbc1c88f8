"""How the copies of a refit plan travel between ranks: by megatron-core's executor, through point-to-point messages.

megatron-core's `execute_reshard_plan` runs one batch: it cuts the slices out of the sender's tensors, hands them to a
copy service, and writes what was received into the receiver's tensors. `Weights` shows it parameters and buffers of all
pipeline chunks as if they were the parameters of one module; `PointToPoint` is the service. Both work with
megatron-core 0.16, whose executor calls `submit_..._with_id`, and with later ones, which pass `task_id`.

Copies within a rank do not pass through here: the executor would stage them, a plain `copy_` does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.resharding.copy_services.base import CopyService
from megatron.core.resharding.execution import execute_reshard_plan
from megatron.core.resharding.utils import ReshardPlan, TransferOp
from torch import Tensor, nn

from megatron_dlm.rollout.reshard_plan import Copy, Region


class Weights(nn.Module):
    """Tensors by name, in the form of a module, which is what the executor reads them from. It owns none of them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = dict(tensors)

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


class PointToPoint(CopyService):
    """Sends and receives what was submitted, in one batch, over the default process group.

    Both ends submit the messages between them in the same order, so none of them needs a tag.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[dist.P2POp] = []

    def submit_send(self, src_tensor: Tensor, dest_rank: int, task_id: int | None = None) -> None:
        self.messages.append(dist.P2POp(dist.isend, src_tensor, dest_rank))

    def submit_recv(self, dest_tensor: Tensor, src_rank: int, task_id: int | None = None) -> None:
        self.messages.append(dist.P2POp(dist.irecv, dest_tensor, src_rank))

    def submit_send_with_id(self, task_id: int, src_tensor: Tensor, dest_rank: int) -> None:
        self.submit_send(src_tensor, dest_rank, task_id)

    def submit_recv_with_id(self, task_id: int, dest_tensor: Tensor, src_rank: int) -> None:
        self.submit_recv(dest_tensor, src_rank, task_id)

    def run(self) -> None:
        """Exchange what was submitted. Returns when this rank's tensors may be used, for work queued on its device."""
        messages, self.messages = self.messages, []
        if messages:
            for request in dist.batch_isend_irecv(messages):
                request.wait()


def operations(batch: Sequence[Copy], rank: int) -> ReshardPlan:
    """What `rank` sends and receives in a batch, as the executor wants it."""
    sends, receives = [], []
    for number, copy in enumerate(batch):
        here, there = slices(copy.source_region), slices(copy.target_region)
        if copy.source == rank:
            sends.append(TransferOp(copy.name, copy.target, True, here, there, number))
        elif copy.target == rank:
            receives.append(TransferOp(copy.name, copy.source, False, there, here, number))
    return ReshardPlan(sends, receives)


def carry(
    plan: ReshardPlan, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], service: CopyService
) -> None:
    """Run one batch. Collective over the world: every rank runs every batch, also those in which it has no part.

    Args:
        sources, targets: this rank's training and rollout tensors. The executor goes through all that it is shown, so
            it sees those of the batch only.
    """
    given, taken = (
        Weights({operation.param_name: tensors[operation.param_name] for operation in half})
        for half, tensors in ((plan.send_ops, sources), (plan.recv_ops, targets))
    )
    with torch.no_grad():
        execute_reshard_plan(plan, given, taken, service)


def slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)
