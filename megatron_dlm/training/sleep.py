"""Sleep and wake: a TrainState gives device memory back while another part of the process needs it.

    sleep(state)                 # gradients are freed, the optimizer's state and master weights go to host memory
    traces = rollout(...)        # the engine reads the parameters, which stay where they are
    wake(state)                  # gradients are there again, as zeros; the optimizer as it was, bit by bit
    train_step(state, ...)

What moves are storages, not tensors: a storage is shrunk to nothing and grown again, and every tensor over it (a view
of a bucket, a parameter's `main_grad`, a shard of a master weight) is whole again without having been touched. So the
kind of optimizer does not matter, as long as its tensors are found through its parameter groups and its state. What
shares a storage with a parameter stays: an fp32 model's optimizer updates the parameters themselves, or views of their
buffer. (megatron-core's `offload_to_cpu` replaces `data` of whatever the optimizer holds: it would take those
parameters away too, and leave an optimizer that holds views of them with detached copies, which no model reads.)

A state sleeps between updates. Whatever needs the gradients or the optimizer wakes it: an update, a checkpoint's
optimizer, loading. Forward passes without gradients do not.

Invariants (tests/training/test_sleep.py):
  - training with a sleep between any two updates is the same, bit by bit, checkpoints included;
  - while a state sleeps, its gradients and its optimizer hold no device memory;
  - parameters have the same address before, during and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, UntypedStorage

from megatron_dlm import platform
from megatron_dlm.platform import memory
from megatron_dlm.training.host_optimizer import device_masters, is_on_host
from megatron_dlm.training.state import TrainState

# Pinned memory is handed out in powers of two: one large buffer could take nearly twice what it holds.
CHUNK_BYTES = 2**26


class HostCopy:
    """The bytes of some storages in host memory, one after the other, in pieces of `CHUNK_BYTES`.

    The pieces are kept for the next time on a host with a device, where pinning them takes longer than filling them.
    """

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    def save(self, storages: list[UntypedStorage]) -> None:
        self._fit(sum(storage.nbytes() for storage in storages))
        for here, there in self._pieces(storages):
            there.copy_(here, non_blocking=True)

    def restore(self, storages: list[UntypedStorage]) -> None:
        """The bytes of the same storages, which have their sizes again."""
        for here, there in self._pieces(storages):
            here.copy_(there, non_blocking=True)

    def forget(self) -> None:
        if not platform.is_cuda():
            self.chunks.clear()

    def _fit(self, total: int) -> None:
        sizes = [CHUNK_BYTES] * (total // CHUNK_BYTES) + [total % CHUNK_BYTES]
        kept = dict(enumerate(self.chunks))
        fits = lambda index, size: index in kept and kept[index].numel() >= size
        self.chunks = [
            kept[index] if fits(index, size) else memory.host_buffer(size) for index, size in enumerate(sizes) if size
        ]

    def _pieces(self, storages: list[UntypedStorage]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of uint8 tensors of one length, in a storage and in host memory."""
        place = 0
        for storage in storages:
            rest = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            while len(rest):
                index, offset = divmod(place, CHUNK_BYTES)
                length = min(len(rest), CHUNK_BYTES - offset)
                yield rest[:length], self.chunks[index][offset : offset + length]
                rest, place = rest[length:], place + length


@dataclass(slots=True)
class Sleep:
    """What a TrainState has given back.

    Attributes:
        asleep: whether it sleeps now.
        freed, moved: storages of the gradients, and of the optimizer, with their bytes.
        addresses: of the parameters.
    """

    asleep: bool = False
    freed: list[tuple[UntypedStorage, int]] = field(default_factory=list)
    moved: list[tuple[UntypedStorage, int]] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    copy: HostCopy = field(default_factory=HostCopy)


@torch.no_grad()
def sleep(state: TrainState) -> None:
    """Give the device memory of gradients and optimizer back. Gradients are lost. Nothing happens to a sleeping state.

    Raises:
        RuntimeError: an update is under way.
    """
    if asleep(state):
        return
    _refuse_unfinished(state)
    if state.optimizer is not None:
        state.optimizer.zero_grad()  # what it made of the gradients is of no use without them
    platform.synchronize()  # no stream may still be reducing what is freed here
    rest = state.sleep or Sleep()
    kept = {_key(tensor.untyped_storage()) for tensor in parameter_tensors(state)}
    freed = _storages(gradient_tensors(state), kept)
    _own(optimizer_tensors(state), kept)
    moved = _storages(optimizer_tensors(state), kept | {_key(storage) for storage in freed})
    rest.copy.save(moved)
    platform.synchronize()
    rest.freed = [(storage, storage.nbytes()) for storage in freed]
    rest.moved = [(storage, storage.nbytes()) for storage in moved]
    rest.addresses = _addresses(state)
    state.sleep, rest.asleep = rest, True  # from here on waking repairs whatever was done
    for storage in chain(freed, moved):
        storage.resize_(0)
    _forget_copies_in_fp8(state)
    memory.give_back()


@torch.no_grad()
def wake(state: TrainState) -> None:
    """Take the memory again: gradients are zeros, the optimizer is what it was. Nothing happens to a state that is
    awake.

    Raises:
        torch.OutOfMemoryError: there is no room; the state sleeps on.
        RuntimeError: a parameter was moved meanwhile, and whoever reads it by its address would read something else.
    """
    if not asleep(state):
        return
    rest = state.sleep
    try:
        for storage, nbytes in chain(rest.freed, rest.moved):
            storage.resize_(nbytes)
    except RuntimeError:
        for storage, _ in chain(rest.freed, rest.moved):
            storage.resize_(0)
        memory.give_back()
        raise
    rest.copy.restore([storage for storage, _ in rest.moved])
    for storage, _ in rest.freed:
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
    platform.synchronize()
    rest.asleep = False
    rest.freed, rest.moved = [], []
    rest.copy.forget()
    if rest.addresses != _addresses(state):
        names = [name for name, _ in state.named_parameters()]
        moved = [name for name, before, now in zip(names, rest.addresses, _addresses(state)) if before != now]
        raise RuntimeError(f"parameters were moved while their TrainState slept: {', '.join(moved[:3])}")


def asleep(state: TrainState) -> bool:
    return state.sleep is not None and state.sleep.asleep


def parameter_tensors(state: TrainState) -> Iterator[Tensor]:
    """Weights and buffers of the model. With the distributed optimizer the weights are views of larger tensors. Of
    weights that are kept in FP8: their bytes and scales.
    """
    for chunk in state.unwrapped_chunks():
        for tensor in chain(chunk.parameters(), chunk.buffers()):
            yield from _memory_of(tensor)


def gradient_tensors(state: TrainState) -> Iterator[Tensor]:
    """The buffers of all gradients, and what autograd or an optimizer has beside them."""
    for chunk in state.chunks:
        yield from (buffer.grad_data for buffer in chain(chunk.buffers, chunk.expert_parallel_buffers))
    parameters = chain.from_iterable(chunk.parameters() for chunk in state.unwrapped_chunks())
    for tensor in chain(parameters, _optimized(state)):
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad


def optimizer_tensors(state: TrainState) -> Iterator[Tensor]:
    """What the optimizer updates (of an fp32 model: the parameters themselves), and its state."""
    yield from _optimized(state)
    for part in _parts(state.optimizer):
        for values in part.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))
        if is_on_host(part.optimizer):
            yield from device_masters(part.optimizer)


def state_to_come(state: TrainState) -> int:
    """Bytes of this rank that the optimizer takes when it first updates, and has not taken yet: its moments, in the
    type of what it updates (of a bf16 model: the master weights). 0 while the state sleeps: they sleep with it then.
    """
    if asleep(state):
        return 0
    owed = 0
    for part in _parts(state.optimizer):
        if is_on_host(part.optimizer):
            new = (master for master in device_masters(part.optimizer) if not part.optimizer.state)
            owed += 2 * sum(master.nbytes for master in new)
            continue
        for group in part.optimizer.param_groups:
            moments = 2 if "betas" in group else 1 if group.get("momentum") else 0
            new = (tensor for tensor in group["params"] if not part.optimizer.state.get(tensor))
            owed += moments * sum(tensor.nbytes for tensor in new)
    return owed


def host_tensors(state: TrainState) -> list[Tensor]:
    """Where a sleeping state's optimizer is; kept when it wakes if it is pinned."""
    return [] if state.sleep is None else state.sleep.copy.chunks


def _optimized(state: TrainState) -> Iterator[Tensor]:
    for part in _parts(state.optimizer):
        yield from chain.from_iterable(group["params"] for group in part.optimizer.param_groups)


def _parts(optimizer: MegatronOptimizer | None) -> list[MegatronOptimizer]:
    """The optimizers that hold something: experts have one of their own, and a rank may have no parameter for one."""
    if isinstance(optimizer, ChainedOptimizer):
        return [part for one in optimizer.chained_optimizers for part in _parts(one)]
    return [] if optimizer is None or optimizer.optimizer is None else [optimizer]


def _key(storage: UntypedStorage) -> int:
    """The same for all tensors over one storage; its address would not do, as one that was given back has none."""
    return storage._cdata


def _storages(tensors: Iterable[Tensor], kept: set[int]) -> list[UntypedStorage]:
    """The storages on the device that lie under some tensors, each once, in order; without those in `kept`."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if _key(storage) not in kept and storage.device.type == platform.device().type and storage.nbytes():
            found.setdefault(_key(storage), storage)
    return list(found.values())


def _own(tensors: Iterable[Tensor], kept: set[int]) -> None:
    """Give tensors memory of their own where theirs cannot be resized: what is read from a checkpoint may lie in
    memory that belongs to the reader.
    """
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if _key(storage) not in kept and not storage.resizable():
            tensor.data = tensor.data.clone()


def _memory_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that have memory: this one, or what a weight in FP8 consists of, which has none of its own and claims
    that of its type. Transformer Engine keeps them as private attributes, whose names depend on the recipe.
    """
    if not is_float8tensor(tensor):
        return [tensor]
    return [part for name, part in vars(tensor).items() if name.startswith("_") and isinstance(part, Tensor)]


def _addresses(state: TrainState) -> list[int]:
    return [_address(parameter) for _, parameter in state.named_parameters()]


def _address(parameter: Tensor) -> int:
    """Of a weight in FP8 that of its bytes by rows: those by columns come and go with the passes."""
    if not is_float8tensor(parameter):
        return parameter.data_ptr()
    found = [part for name in ("_data", "_rowwise_data") if (part := getattr(parameter, name, None)) is not None]
    return found[0].data_ptr() if found else 0


def _forget_copies_in_fp8(state: TrainState) -> None:
    """Layers of Transformer Engine keep their weights in FP8 too, from the first row of an update to the next update;
    whoever needs them makes them again.
    """
    for chunk in state.unwrapped_chunks():
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()


def _refuse_unfinished(state: TrainState) -> None:
    for chunk in state.chunks:
        for group in chain(chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
            if group.grad_reduce_handle is not None:
                raise RuntimeError("a TrainState cannot sleep in the middle of an update: gradients are being reduced")
