"""Refit for SGLang: the trained weights as whole tensors under their HuggingFace names, in buckets, to the child.

Where each piece of each tensor lies in training follows from the tables of the checkpoint families: a rank's shards are
parts of stored tensors (checkpoint/hf/stored.py), and spans say which rows of which HuggingFace tensors these are. The
plan is made once, of shapes alone. An update then goes bucket by bucket: each owner of pieces broadcasts them in one
message, and the ranks whose workers need it put the bucket together. So a rank needs memory for two buckets, or for
twice the largest tensor.

Pieces that several ranks hold are taken from the one that has the least to send so far.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.checkpoint.hf.families import Family
from megatron_dlm.checkpoint.hf.importer import shards_of
from megatron_dlm.checkpoint.hf.spans import Stored, tensors_of, within
from megatron_dlm.checkpoint.hf.stored import place_of, whole_model
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.rollout.refit import RefitReport
from megatron_dlm.rollout.sglang.client import SGLangEngine
from megatron_dlm.rollout.sglang.tensors import handle_of
from megatron_dlm.training.state import TrainState

_ALIGNMENT = 16  # bytes: every type may be read from the place of any tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a stored tensor: where it begins, and its own shape."""

    stored: Stored
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a HuggingFace tensor that a rank holds.

    Attributes:
        name: of the tensor.
        row, rows, column, columns: the part of it; columns are 0 for vectors.
        owner, shard, local_row: from which rank, which of its shards, which row of that.
        dtype: of the shard.
    """

    name: str
    row: int
    rows: int
    column: int
    columns: int
    owner: int
    shard: int
    local_row: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.rows * max(self.columns, 1) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a bucket: bytes [start, end)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together. `pieces`: by owner, in the order in which they are sent."""

    places: list[Place]
    pieces: dict[int, list[Piece]]

    @property
    def nbytes(self) -> int:
        return self.places[-1].end


def plan(ranks: Sequence[Sequence[Shard]], family: Family, model: ModelConfig, bucket_bytes: int) -> list[Bucket]:
    """The buckets of an update. Pure: the same on every rank.

    Args:
        ranks: the shards of every rank.

    Raises:
        ValueError: the ranks together lack a part of a tensor.
    """
    offers: dict[tuple, list[Piece]] = {}
    for owner, shards in enumerate(ranks):
        for index, shard in enumerate(shards):
            for piece in _pieces(shard, owner, index, family, model):
                offers.setdefault((piece.name, piece.row, piece.rows, piece.column, piece.columns), []).append(piece)
    load, chosen = [0] * len(ranks), {}
    for same in offers.values():
        piece = min(same, key=lambda one: (load[one.owner], one.owner))
        load[piece.owner] += piece.nbytes
        chosen.setdefault(piece.name, []).append(piece)
    wanted = []
    for name, (shape, _) in tensors_of(family.table, whole_model(model), model).items():
        pieces = chosen.get(name, [])
        held = sum(piece.rows * max(piece.columns, 1) for piece in pieces)
        if held != torch.Size(shape).numel():
            raise ValueError(f"the training ranks hold {held} numbers of {name}, which has {torch.Size(shape).numel()}")
        wanted.append((name, shape, pieces))
    return _fill(wanted, bucket_bytes)


def _pieces(shard: Shard, owner: int, index: int, family: Family, model: ModelConfig) -> Iterable[Piece]:
    spans = family.table[shard.stored.key].spans(shard.stored, model)
    column, columns = (shard.offset[1], shard.shape[1]) if len(shard.shape) > 1 else (0, 0)
    for span in within(spans, shard.offset[0], shard.shape[0]):
        yield Piece(span.name, span.source, span.count, column, columns, owner, index, span.start, shard.dtype)


def _fill(wanted: Iterable[tuple[str, tuple[int, ...], list[Piece]]], limit: int) -> list[Bucket]:
    """Runs of tensors of at most `limit` bytes; a larger tensor is a bucket of its own."""
    buckets: list[Bucket] = []
    end = limit
    for name, shape, pieces in wanted:
        dtype = pieces[0].dtype
        size = torch.Size(shape).numel() * dtype.itemsize
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if not buckets or start + size > limit:
            buckets.append(Bucket([], {}))
            start = 0
        end = start + size
        buckets[-1].places.append(Place(name, dtype, shape, start, end))
        for piece in pieces:
            buckets[-1].pieces.setdefault(piece.owner, []).append(piece)
    return buckets


class SharedBuffer:
    """A bucket that the child can read: a nameless file in memory that both map, or memory of this rank's device."""

    def __init__(self) -> None:
        self.fd = None if platform.is_cuda() else os.memfd_create("megatron-dlm-weights")
        self._map: mmap.mmap | None = None
        self._flat: Tensor | None = None

    def flat(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], the same memory each time as long as it is large enough."""
        if self._flat is None or len(self._flat) < nbytes:
            self._flat = None
            if self.fd is None:
                self._flat = torch.empty(nbytes, dtype=torch.uint8, device=platform.device())
            else:
                os.ftruncate(self.fd, nbytes)
                self._map = mmap.mmap(self.fd, nbytes)
                self._flat = torch.frombuffer(self._map, dtype=torch.uint8)
        return self._flat[:nbytes]

    def release(self) -> None:
        """Give the memory back; the file stays, empty."""
        self._flat = self._map = None
        if self.fd is not None:
            os.ftruncate(self.fd, 0)


class SGLangRefit:
    """Carries the weights of a TrainState to SGLang, as often as `run` is called. Building it is collective.

    Args:
        family: as which SGLang serves the model.
        buffer: shared with this replica's child.
    """

    def __init__(
        self,
        state: TrainState,
        engine: SGLangEngine,
        model: ModelConfig,
        family: Family,
        buffer: SharedBuffer,
        bucket_bytes: int,
    ) -> None:
        self.state, self.engine, self.buffer = state, engine, buffer
        mine = [Shard(*place_of(shard), tuple(shard.data.shape), shard.data.dtype) for shard in shards_of(state)]
        self.buckets = plan(gather_objects(mine), family, model, bucket_bytes)
        # On the CPU the leader's buffer serves all workers; on CUDA each reads from the device that it lives on.
        self.assembles = engine.is_leader or platform.is_cuda()

    @torch.no_grad()
    def run(self) -> RefitReport:
        """Bring SGLang up to date; it must be idle, and forget its cache afterwards. Collective."""
        begin, received, copied = time.monotonic(), 0, 0
        self.state.gather_parameters()
        shards = [shard.data for shard in shards_of(self.state)]
        self.engine.command("begin_update")
        for bucket in self.buckets:
            flat = self.buffer.flat(bucket.nbytes) if self.assembles else None
            for owner, pieces in bucket.pieces.items():
                self._carry(owner, pieces, shards, bucket, flat)
                if owner != dist.get_rank():
                    received += sum(piece.nbytes for piece in pieces)
            copied += bucket.nbytes if self.assembles else 0
            platform.synchronize()
            places = [_described(place) for place in bucket.places]
            self.engine.command("load", tensors=places, buffers=self._shown(bucket))
        self.engine.command("end_update")
        self.buffer.release()
        return RefitReport(received, copied, 0, time.monotonic() - begin)

    def _carry(
        self, owner: int, pieces: list[Piece], shards: list[Tensor], bucket: Bucket, flat: Tensor | None
    ) -> None:
        """One owner's pieces of a bucket, from its shards into the bucket of every rank that assembles it."""
        mine = dist.get_rank() == owner
        if mine:
            parts = [shards[piece.shard].detach().narrow(0, piece.local_row, piece.rows) for piece in pieces]
        if dist.get_world_size() > 1:
            nbytes = sum(piece.nbytes for piece in pieces)
            if mine:
                sent = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
            else:
                sent = torch.empty(nbytes, dtype=torch.uint8, device=platform.device())
            dist.broadcast(sent, src=owner)
            if not mine:
                lengths = [piece.nbytes for piece in pieces]
                parts = [_view(part, piece) for part, piece in zip(sent.split(lengths), pieces)]
        if flat is None:
            return
        places = {place.name: place for place in bucket.places}
        for part, piece in zip(parts, pieces):
            place = places[piece.name]
            target = flat[place.start : place.end].view(place.dtype).view(place.shape).narrow(0, piece.row, piece.rows)
            if piece.columns:
                target = target.narrow(1, piece.column, piece.columns)
            target.copy_(part)

    def _shown(self, bucket: Bucket) -> dict[str, Any]:
        """How the child finds the bucket."""
        if self.buffer.fd is not None:
            return {"fd": self.buffer.fd, "bytes": bucket.nbytes}
        handle = handle_of(self.buffer.flat(bucket.nbytes))
        return {"handles": [handle] if self.engine.group is None else gather_objects(handle, self.engine.group)}


def _view(part: Tensor, piece: Piece) -> Tensor:
    shape = (piece.rows, piece.columns) if piece.columns else (piece.rows,)
    return (part if part.storage_offset() % piece.dtype.itemsize == 0 else part.clone()).view(piece.dtype).view(shape)


def _described(place: Place) -> dict[str, Any]:
    return {
        "name": place.name,
        "dtype": str(place.dtype).removeprefix("torch."),
        "shape": list(place.shape),
        "start": place.start,
        "end": place.end,
    }
