"""Carry the trained weights to the rollout model of the same processes, whatever the two layouts are.

    refit = Refit(state, rollout_model)      # the model is best built on the meta device
    for step in ...:
        traces = rollout(rollout_model)
        train_step(state, ...)
        refit.run()                          # the next rollout sees the new weights

What a rank needs just as it trains it is shared: the rollout model gets the training parameter itself, and nothing is
ever copied. That is decided for each tensor: where only the experts are laid out otherwise, only they move. The rest
gets storage of its own, and each refit copies into it what reshard_plan.py has planned, once, when the Refit is built:
slices that the rank trains itself directly, slices of other ranks through megatron-core's executor (transport.py) in
batches, so that the extra memory is one bucket.

megatron-core has a planner too. It looks at the first virtual chunk only, at parameters and no buffers, and does not
find experts of its own CPU layers on another rank; so the plan is ours.

Sharing survives whatever moves the storage of a training parameter (`parameter.data = ...`), for the object is the
same; `run` puts the objects in place again, in case some were replaced.

The engine knows no adapters: weights that have one are merged with it on the way, one at a time, into storage of the
engine's own. So in the layout of training a refit writes these weights and shares all others. Nor can it share weights
that it keeps in FP8 (model/fp8.py): each refit rounds them anew (refit_fp8.py).

Invariants (tests/rollout/test_refit.py, test_refit_fp8.py): afterwards every rollout parameter equals, bit by bit, the
training parameter of that name, merged and rounded; shared ones have its address; a model in the layout of training
without adapters or FP8 moves nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor, nn

from megatron_dlm import platform
from megatron_dlm.model.fp8 import fp8_layers, give_storage
from megatron_dlm.model.lora import OF_ADAPTERS, Adapter
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rollout.refit_check import Witness, check_weights
from megatron_dlm.rollout.refit_fp8 import Arrivals, in_turn, pieces
from megatron_dlm.rollout.reshard_plan import Shard, bytes_of, canonical, is_expert, plan_refit
from megatron_dlm.rollout.transport import PointToPoint, carry, operations, slices
from megatron_dlm.training.state import TrainState, adapters_by_weight, global_names

BUCKET_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What one refit did on this rank.

    Attributes:
        received: bytes that came from other ranks.
        copied: bytes that were copied within this rank.
        shared: bytes of the rollout model that are training storage.
        seconds: how long it took, the check of `verify` left out.
    """

    received: int
    copied: int
    shared: int
    seconds: float

    @property
    def moved(self) -> int:
        """Bytes written into the rollout model, as they were before those of weights in FP8 were rounded."""
        return self.received + self.copied


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a tensor of the rollout model hangs: `owner` is a module's table of parameters or of buffers."""

    name: str
    owner: dict[str, Tensor | None]
    key: str


class Refit:
    """Carries the weights of a TrainState to a rollout model, as often as `run` is called. Collective over the world,
    as is building it.

    Args:
        rollout_model: without pipeline stages, with its own `pg_collection`, of the same layers. What it does not
            share gets storage if it has none (meta device). Buffers that only it has, such as a cache, are left alone.
        bucket_bytes: most bytes that a rank stages at a time.
        verify: compare all weights after each refit (refit_check.py).
        share: False copies what could be shared too: an engine that must not see updates before `run`.

    Raises:
        ValueError: names, sizes or types of the two models do not fit.
    """

    def __init__(
        self,
        state: TrainState,
        rollout_model: nn.Module,
        bucket_bytes: int = BUCKET_BYTES,
        verify: bool = False,
        share: bool = True,
    ) -> None:
        self.state, self.rollout_model, self.verify = state, rollout_model, verify
        self.transport = PointToPoint()
        first = _first_expert(rollout_model)
        self.rounded = {canonical(name, first): layer for name, layer in fp8_layers(rollout_model)}
        self.local_names = {canonical(name, first): name for name, _ in fp8_layers(rollout_model)}
        trained = training_shards(state, rollout_model)
        # The plan shares nothing that is computed.
        trained = [replace(s, computed=True) if not share or s.name in self.rounded else s for s in trained]
        training = gather_objects(trained)
        known = {shard.name: shard for shards in training for shard in shards}
        self.slots = [slot for slot in _slots(rollout_model) if slot.name in known or not _is_buffer(slot)]
        wanted = [self._wanted(known.get(slot.name), slot) for slot in self.slots]
        rank = dist.get_rank()
        ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        plan = plan_refit(training, gather_objects(wanted), bucket_bytes, ranks_per_host)
        self.shared = plan.shared[rank]
        self.copies = [copy for copy in plan.local if copy.target == rank]
        self.batches = [operations(batch, rank) for batch in plan.batches]
        self.steps = in_turn(self.copies, self.batches)
        self.received = sum(copy.nbytes for batch in plan.batches for copy in batch if copy.target == rank)
        self.shared_bytes = sum(bytes_of(shard) for shard in wanted if shard.name in self.shared)
        self._give_storage()

    @torch.no_grad()
    def run(self) -> RefitReport:
        """Bring the rollout model up to date.

        Raises:
            TrainingError: `verify` found a difference.
        """
        start = time.monotonic()
        self.state.gather_parameters()  # the optimizer may still owe this rank other ranks' parts
        training = _Given(training_tensors(self.state, self.rollout_model), adapters_by_weight(self.state))
        self._share(training.stored)
        witness = Witness(self.rollout_model, self.local_names) if self.verify else None
        stored = {slot.name: slot.owner[slot.key] for slot in self.slots}
        targets = Arrivals(stored, self.rounded, pieces(self.steps), witness and witness.see)
        for copies, batch in self.steps:
            for copy in copies:
                targets[copy.name][slices(copy.target_region)].copy_(training[copy.name][slices(copy.source_region)])
                targets.landed([copy.name])
            if batch is not None:
                carry(batch, training, targets, self.transport)
                targets.landed(operation.param_name for operation in batch.recv_ops)
        platform.synchronize()
        seconds = time.monotonic() - start
        if witness is not None:
            check_weights(self.state, self.rollout_model, witness.parts)
        return RefitReport(self.received, sum(copy.nbytes for copy in self.copies), self.shared_bytes, seconds)

    def _wanted(self, trained: Shard | None, slot: _Slot) -> Shard:
        """What is carried for a slot: in the type of training, whatever the engine makes of it."""
        shard = _shard_like(trained, slot, self.rollout_model.pg_collection)
        layer = self.rounded.get(slot.name)
        return shard if layer is None else replace(shard, dtype=layer.wide_dtype)

    def _share(self, training: dict[str, Tensor]) -> None:
        for slot in self.slots:
            if slot.name in self.shared:
                slot.owner[slot.key] = training[slot.name]

    def _give_storage(self) -> None:
        """Hang in the shared tensors, and make the others where there is only a meta tensor."""
        self._share(training_tensors(self.state, self.rollout_model))
        for layer in self.rounded.values():
            give_storage(layer, platform.device())
        for slot in self.slots:
            tensor = slot.owner[slot.key]
            if tensor.is_meta:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=platform.device())
                slot.owner[slot.key] = empty if _is_buffer(slot) else nn.Parameter(empty, requires_grad=False)


class _Given(Mapping[str, Tensor]):
    """What a rank gives of each name: a training tensor, merged with its adapter where it has one, and in the type of
    the engine where it is kept in FP8. The last that was computed is kept, because the parts of a tensor are asked for
    one after the other.
    """

    def __init__(self, stored: dict[str, Tensor], adapters: dict[str, Adapter]) -> None:
        self.stored, self.adapters = stored, adapters
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        if name not in self.adapters and not is_float8tensor(stored):
            return stored
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is made
            adapter = self.adapters.get(name)
            self._last = (name, dequantize_fp8_tensor(stored) if adapter is None else adapter.merged(stored))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def training_tensors(state: TrainState, rollout_model: nn.Module) -> dict[str, Tensor]:
    """This rank's training parameters and buffers that the rollout model has too, of all chunks, by their names in the
    whole model.
    """
    found: dict[str, Tensor] = {}
    for chunk in state.unwrapped_chunks():
        rename, first = global_names(chunk), _first_expert(chunk)
        for name, tensor in chain(chunk.named_parameters(), chunk.named_buffers()):
            if OF_ADAPTERS not in name:
                found[canonical(rename(name), first)] = tensor
    if getattr(rollout_model, "share_embeddings_and_output_weights", False):
        found.pop("output_layer.weight", None)  # the last stage's copy of the embedding; the rollout model has one
    return found


def training_shards(state: TrainState, rollout_model: nn.Module) -> list[Shard]:
    """The same as shards."""
    tensors, groups = training_tensors(state, rollout_model), state.groups.pg_collection
    shards = [_shard(name, tensor, groups) for name, tensor in tensors.items()]
    computed = {*adapters_by_weight(state), *(name for name, tensor in tensors.items() if is_float8tensor(tensor))}
    return [replace(shard, computed=True) if shard.name in computed else shard for shard in shards]


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every place of the model where a tensor hangs, with the tensor's name in the whole model."""
    first = _first_expert(model)
    for path, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield _Slot(canonical(f"{path}.{key}" if path else key, first), owner, key)


def _is_buffer(slot: _Slot) -> bool:
    return not isinstance(slot.owner[slot.key], nn.Parameter)


def _first_expert(model: nn.Module) -> int:
    """Number in the whole model of the first expert that this rank holds."""
    experts = model.config.num_moe_experts
    group = model.pg_collection.ep if experts is not None else None
    return 0 if group is None else group.rank() * (experts // group.size())


def _shard(name: str, tensor: Tensor, groups) -> Shard:
    """A training tensor as megatron-core's attributes describe it."""
    if not getattr(tensor, "tensor_model_parallel", False):
        return Shard(name, tuple(tensor.shape), tensor.dtype)
    group = groups.expt_tp if is_expert(name) else groups.tp
    stride = getattr(tensor, "partition_stride", 1)
    return Shard(name, tuple(tensor.shape), tensor.dtype, tensor.partition_dim, stride, group.rank(), group.size())


def _shard_like(trained: Shard | None, slot: _Slot, groups) -> Shard:
    """A rollout tensor. How it is cut is known from the trained one: megatron-core notes it when it draws weights, and
    for the rollout model none are drawn.
    """
    tensor = slot.owner[slot.key]
    shape = tuple(tensor.shape)
    if trained is None or trained.dim is None:
        return Shard(slot.name, shape, tensor.dtype)
    group = groups.expt_tp if is_expert(slot.name) else groups.tp
    return Shard(slot.name, shape, tensor.dtype, trained.dim, trained.stride, group.rank(), group.size())
