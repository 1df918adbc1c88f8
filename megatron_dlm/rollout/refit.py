"""Carry the trained weights to the rollout model of the same processes.

The rollout layout has the tensor and expert shards of training, and no pipeline (parallel/groups.py). So there are two
cases:

  - no pipeline in training: every shard is the same on both sides. `bind` puts the training parameters themselves into
    the rollout model, which may have been built on the meta device; nothing is ever copied. `Refit` also works, for a
    rollout model with storage of its own.
  - pipeline stages: the ranks of a pipeline group together hold what each of them needs. `Refit` lets the owner of each
    layer broadcast it within the group, in buckets, so the extra memory is one bucket. (megatron-core's resharding,
    which can also change the tensor size, sees the first virtual chunk only, carries no buffers, and stages a whole
    copy of the model.)

    refit = Refit(state, rollout_model)
    for step in ...:
        traces = rollout(rollout_model)
        train_step(state, ...)
        refit.run()                          # the next rollout sees the new weights

Invariants (tests/rollout/test_refit.py): afterwards every rollout parameter equals, bit by bit, the training parameter
of that name; bound ones share its address.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dlm import platform
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.training.state import TrainState, global_names

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What one refit moved on this rank: bytes written into the rollout model, and how long it took."""

    bytes: int
    seconds: float


def bind(train_model: nn.Module, rollout_model: nn.Module) -> None:
    """Make the rollout model use the parameters and buffers of the training model: the same objects, not copies.

    Both must be built alike (same layer spec, same shards, no pipeline). Buffers that only the rollout model has, such
    as a cache, are left alone. Call it again if the training model's parameters are ever replaced; when only their data
    moves, the rollout model follows by itself.

    Raises:
        ValueError: names or shapes of the parameters differ.
    """
    trained = dict(train_model.named_parameters(remove_duplicate=False))
    wanted = dict(rollout_model.named_parameters(remove_duplicate=False))
    _check_same(trained, wanted)
    buffers = dict(train_model.named_buffers(remove_duplicate=False))
    for path, module in rollout_model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name in module._parameters:
            if module._parameters[name] is not None:
                module._parameters[name] = trained[prefix + name]
        for name in module._buffers:
            if prefix + name in buffers:
                module._buffers[name] = buffers[prefix + name]


class Refit:
    """Copies the weights of a TrainState into a rollout model, as often as `run` is called. Building it is collective
    over the pipeline group.
    """

    def __init__(self, state: TrainState, rollout_model: nn.Module, bucket_bytes: int = BUCKET_BYTES) -> None:
        """
        Raises:
            ValueError: the rollout model has a parameter that no stage trains, or of another shape.
        """
        self.state, self.rollout_model = state, rollout_model
        here = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(state)}
        stages = gather_objects(here, state.groups.pp)
        owners: dict[str, int] = {}
        for stage, names in reversed(list(enumerate(stages))):
            owners.update(dict.fromkeys(names, stage))  # the first stage that has it: tied embeddings live on two
        parameters = dict(rollout_model.named_parameters())
        everything = {name: stages[owner][name] for name, owner in owners.items()}
        _check_same({name: everything[name] for name in everything if name in parameters}, parameters)
        targets = [name for name in chain(parameters, dict(rollout_model.named_buffers())) if name in owners]
        self.buckets = _fill_buckets(targets, owners, everything, bucket_bytes)

    @torch.no_grad()
    def run(self) -> RefitReport:
        """Bring the rollout model up to date. Collective over the pipeline group."""
        start = time.monotonic()
        self.state.gather_parameters()
        groups, mine = self.state.groups, dict(_tensors(self.state))
        targets = dict(chain(self.rollout_model.named_parameters(), self.rollout_model.named_buffers()))
        written = 0
        for owner, dtype, names in self.buckets:
            if groups.pp_size == 1:
                for name in names:
                    targets[name].copy_(mine[name])
            else:
                self._broadcast(owner, dtype, [(mine.get(name), targets[name]) for name in names])
            written += sum(targets[name].nbytes for name in names)
        platform.synchronize()
        return RefitReport(written, time.monotonic() - start)

    def _broadcast(self, owner: int, dtype: torch.dtype, pairs: list[tuple[Tensor | None, Tensor]]) -> None:
        """Send one bucket of (source on the owner, target) from the owning stage to all stages."""
        groups = self.state.groups
        if groups.pp_rank == owner:
            flat = torch.cat([source.reshape(-1) for source, _ in pairs])
        else:
            flat = torch.empty(sum(target.numel() for _, target in pairs), dtype=dtype, device=platform.device())
        dist.broadcast(flat, src=dist.get_global_rank(groups.pp, owner), group=groups.pp)
        for piece, (_, target) in zip(flat.split([target.numel() for _, target in pairs]), pairs, strict=True):
            target.copy_(piece.view_as(target))


def _tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """This stage's parameters and buffers of all chunks, by their names in the whole model."""
    for chunk in state.unwrapped_chunks():
        rename = global_names(chunk)
        for name, tensor in chain(chunk.named_parameters(), chunk.named_buffers()):
            yield rename(name), tensor.detach()


def _check_same(trained: dict, wanted: dict[str, nn.Parameter]) -> None:
    missing, unused = sorted(wanted.keys() - trained.keys()), sorted(trained.keys() - wanted.keys())
    if missing or unused:
        raise ValueError(
            f"rollout and training model differ: only the rollout model has {missing[:3]}, only the training model has "
            f"{unused[:3]}"
        )
    for name, target in wanted.items():
        source = trained[name]
        shape = tuple(source.shape) if isinstance(source, Tensor) else source[0]
        if shape != tuple(target.shape):
            raise ValueError(f"{name} has shape {tuple(target.shape)} in the rollout model and {shape} in training")


def _fill_buckets(
    targets: list[str], owners: dict[str, int], known: dict[str, tuple[tuple[int, ...], torch.dtype]], limit: int
) -> list[tuple[int, torch.dtype, list[str]]]:
    """Group the tensors by owner and dtype into buckets of at most `limit` bytes (a larger tensor is a bucket of its
    own).
    """
    buckets: list[tuple[int, torch.dtype, list[str]]] = []
    fill: dict[tuple[int, torch.dtype], tuple[int, list[str]]] = {}
    for name in targets:
        (shape, dtype), owner = known[name], owners[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        used, names = fill.get((owner, dtype), (limit, []))
        if used + size > limit:
            names, used = [], 0
            buckets.append((owner, dtype, names))
        names.append(name)
        fill[owner, dtype] = used + size, names
    return buckets
