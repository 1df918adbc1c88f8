"""Which slice of which rank's weights goes where: from the training layout to the rollout layout.

Every rank describes what it trains and what its engine needs as a list of `Shard`s. From the lists of all ranks
`plan_refit` makes one `Plan`, the same on every rank, in three steps:

  1. what a rank needs and trains as the same part of the same tensor is shared: its engine reads that storage, unless
     what the engine is to read is no stored tensor but computed;
  2. of the rest, each piece comes from the rank itself if it trains it; otherwise from a replica on its own host, else
     from any, always from the one that has least to send so far;
  3. pieces are cut and put into batches, so that what a rank stages at a time stays within one bucket.

Names are those of the whole model: layers counted over pipeline stages and their chunks, experts over the ranks that
share them (`canonical`). A tensor-parallel tensor is cut along one dimension, in `stride` blocks of which each rank has
its part: one block for most, two for a gated first layer ([gate; up]). Query, key and value stand group by group along
the dimension, so one block is right for them whatever the size.

Pure functions: no device, no process group.

Invariants (tests/rollout/test_reshard_plan.py): after the copies of a plan every rank has what it needs, element by
element; nothing is sent that its receiver has; no batch stages more than a bucket on any rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Region = tuple[tuple[int, int], ...]
"""A box in a tensor: (start, stop) of each dimension."""

_SEQUENTIAL = re.compile(r"^(.*\.experts)\.local_experts\.(\d+)\.(.+)$")
_GROUPED = re.compile(r"^(.*\.experts)\.(linear_fc\d)\.(weight|bias)(\d+)$")
_FUSED_NORM = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Norms within a layer that Transformer Engine computes together with the product behind them; by their own names."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED = re.compile(r"\.experts\.weight[12]$")


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a tensor.

    Attributes:
        name: in the whole model.
        shape: of this part.
        dtype: of its elements.
        dim: the dimension that tensor-parallel ranks share; None where each has the whole.
        stride: blocks along `dim` that are shared one by one.
        index, parts: which part of how many; read only where there is a `dim`.
        computed: of a training tensor: what its rank gives is computed for each refit (weights with their adapters
            merged), so that no storage can be shared.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None = None
    stride: int = 1
    index: int = 0
    parts: int = 1
    computed: bool = False

    @property
    def part(self) -> tuple[int, int, int, int] | None:
        """What tells apart the parts of a tensor; None is the whole."""
        return None if self.dim is None or self.parts == 1 else (self.dim, self.stride, self.index, self.parts)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if self.part is None:
            return self.shape
        return tuple(size * self.parts if dim == self.dim else size for dim, size in enumerate(self.shape))

    def spans(self, dim: int) -> list[tuple[int, int, int]]:
        """What it holds of the whole along `dim`: (start, stop, where start stands in this part) for each block."""
        size = self.shape[dim]
        if self.part is None or dim != self.dim:
            return [(0, size, 0)]
        block = size // self.stride
        starts = [(number * self.parts + self.index) * block for number in range(self.stride)]
        return [(start, start + block, number * block) for number, start in enumerate(starts)]


@dataclass(frozen=True, slots=True)
class Copy:
    """A box of `name` on rank `source` that goes to a box of the same shape on rank `target`."""

    name: str
    source: int
    target: int
    source_region: Region
    target_region: Region
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a refit does on all ranks.

    Attributes:
        shared: for each rank, the names whose training storage its engine reads.
        local: copies within a rank; they need no staging.
        batches: copies between ranks, one batch after the other. Two ranks find theirs in the same order.
    """

    shared: tuple[frozenset[str], ...]
    local: tuple[Copy, ...]
    batches: tuple[tuple[Copy, ...], ...]


def canonical(name: str, first_expert: int) -> str:
    """The name of a tensor in the whole model, whichever rank holds the expert and whichever layer computes it.

    Args:
        name: with layers counted over the whole model, experts from 0 on each rank.
        first_expert: number of this rank's expert 0.

    Raises:
        ValueError: the experts of a rank are one tensor, which does not say where each begins.
    """
    if _FUSED.search(name):
        raise ValueError(f"{name} holds several experts in one tensor, which cannot be carried to another layout")
    if match := _SEQUENTIAL.match(name):
        prefix, number, rest = match.groups()
    elif match := _GROUPED.match(name):
        prefix, layer, kind, number = match.groups()
        rest = f"{layer}.{kind}"
    else:
        for fused, alone in _FUSED_NORM.items():
            name = name.replace(f".{fused}", f".{alone}")
        return name
    return f"{prefix}.{first_expert + int(number)}.{rest}"


def is_expert(name: str) -> bool:
    """Whether a canonical name is that of a routed expert."""
    return _EXPERT.search(name) is not None


def plan_refit(
    training: Sequence[Sequence[Shard]],
    rollout: Sequence[Sequence[Shard]],
    bucket_bytes: int,
    ranks_per_host: int | None = None,
) -> Plan:
    """Plan the copies from what each rank trains to what each rank's engine needs.

    Args:
        training, rollout: the shards of each rank, by rank.
        bucket_bytes: most bytes that a rank stages at a time: what it sends and receives in a batch, and a temporary
            copy of one piece. A single element is never cut.
        ranks_per_host: neighbouring ranks that share a host; None for all of them.

    Raises:
        ValueError: a name that only one side has, or sizes, element types or parts that do not fit.
    """
    holders = _holders(training)
    _check(holders, rollout)
    hosts = ranks_per_host or len(training)
    own = [{shard.name: shard.part for shard in shards if not shard.computed} for shards in training]
    sent = [0] * len(training)
    shared, local, remote = [set() for _ in rollout], [], []
    wanted: dict[str, list[tuple[int, Shard]]] = {}
    for rank, shards in enumerate(rollout):
        for shard in shards:
            if shard.name in own[rank] and own[rank][shard.name] == shard.part:
                shared[rank].add(shard.name)
            else:
                wanted.setdefault(shard.name, []).append((rank, shard))
    for name, takers in wanted.items():  # all takers of a tensor in turn, so that a batch keeps all ranks busy
        for rank, shard in takers:
            for source, ranks in holders[name].values():
                chosen = None
                for source_region, target_region in _pieces(source, shard):
                    nbytes = _count(source_region) * shard.dtype.itemsize
                    if chosen is None:
                        chosen = _choose(ranks, rank, hosts, sent)
                    if chosen != rank:
                        sent[chosen] += nbytes
                    (local if chosen == rank else remote).append(
                        Copy(name, chosen, rank, source_region, target_region, nbytes)
                    )
    return Plan(tuple(map(frozenset, shared)), tuple(local), _batches(remote, bucket_bytes))


def bytes_of(shard: Shard) -> int:
    return math.prod(shard.shape) * shard.dtype.itemsize


def _holders(training: Sequence[Sequence[Shard]]) -> dict[str, dict[tuple | None, tuple[Shard, list[int]]]]:
    """For each name, its distinct parts and the ranks that have each."""
    holders: dict[str, dict[tuple | None, tuple[Shard, list[int]]]] = {}
    for rank, shards in enumerate(training):
        for shard in shards:
            parts = holders.setdefault(shard.name, {})
            first = next(iter(parts.values()))[0] if parts else shard
            if (first.whole, first.dtype, first.dim, first.stride) != (
                shard.whole,
                shard.dtype,
                shard.dim,
                shard.stride,
            ):
                raise ValueError(f"the training ranks disagree about {shard.name}: {first} and {shard}")
            parts.setdefault(shard.part, (shard, []))[1].append(rank)
    return holders


def _check(holders: Mapping[str, Mapping], rollout: Sequence[Sequence[Shard]]) -> None:
    needed = {shard.name: shard for shards in rollout for shard in shards}
    missing, unused = sorted(needed.keys() - holders.keys()), sorted(holders.keys() - needed.keys())
    if missing or unused:
        raise ValueError(
            f"rollout and training model differ: only the rollout model has {missing[:3]}, only the training model has "
            f"{unused[:3]}"
        )
    for shards in rollout:
        for shard in shards:
            trained = next(iter(holders[shard.name].values()))[0]
            if trained.whole != shard.whole:
                hint = (
                    ". The vocabulary must be padded alike on both sides"
                    if shard.name.endswith(("word_embeddings.weight", "output_layer.weight"))
                    else ""
                )
                raise ValueError(
                    f"{shard.name} has shape {shard.whole} in the rollout model and {trained.whole} in training{hint}"
                )
            if trained.dtype != shard.dtype:
                raise ValueError(
                    f"{shard.name} is {shard.dtype} in the rollout model and {trained.dtype} in training; refit copies "
                    "bits and casts nothing"
                )
            if shard.part is not None and (shard.dim, shard.stride) != (trained.dim, trained.stride):
                raise ValueError(f"{shard.name} is cut differently in the rollout model ({shard}) and in training")
            if shard.part is not None and shard.shape[shard.dim] % shard.stride:
                raise ValueError(f"{shard.name}: {shard.shape[shard.dim]} do not make {shard.stride} equal blocks")
            if len(holders[shard.name]) != (trained.parts if trained.part else 1):
                raise ValueError(f"{shard.name}: some of its {trained.parts} parts are on no training rank")


def _pieces(source: Shard, target: Shard) -> Iterator[tuple[Region, Region]]:
    """Where two parts of a tensor overlap: the box in the source and the box in the target, for each overlap."""
    if source.part is None and target.part is None:
        box = tuple((0, size) for size in target.shape)
        yield box, box
        return
    dim = target.dim if source.part is None else source.dim
    for start, stop, here in target.spans(dim):
        for source_start, source_stop, there in source.spans(dim):
            low, high = max(start, source_start), min(stop, source_stop)
            if low < high:
                yield (
                    _box(source.shape, dim, there + low - source_start, high - low),
                    _box(target.shape, dim, here + low - start, high - low),
                )


def _box(shape: tuple[int, ...], dim: int, start: int, length: int) -> Region:
    return tuple((start, start + length) if axis == dim else (0, size) for axis, size in enumerate(shape))


def _count(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)


def _choose(ranks: list[int], target: int, ranks_per_host: int, sent: list[int]) -> int:
    """The rank that gives `target` a part which all of `ranks` have."""
    if target in ranks:
        return target
    near = [rank for rank in ranks if rank // ranks_per_host == target // ranks_per_host]
    return min(near or ranks, key=lambda rank: (sent[rank], abs(rank - target), rank))


@dataclass(slots=True)
class _Batch:
    copies: list[Copy] = field(default_factory=list)
    staged: dict[int, int] = field(default_factory=dict)


def _batches(copies: Sequence[Copy], bucket_bytes: int) -> tuple[tuple[Copy, ...], ...]:
    """Cut large copies, and fill batches in order. A piece is at most a quarter of the bucket, and the pieces of a
    batch fill three quarters of it: the last one is for a copy that megatron-core makes of a piece while it stages it.
    """
    piece, limit = max(1, bucket_bytes // 4), max(1, bucket_bytes - bucket_bytes // 4)
    batches: list[_Batch] = []
    for copy in copies:
        for part in _cut(copy, piece):
            last = batches[-1] if batches else None
            if last is None or any(
                last.staged.get(rank, 0) and last.staged[rank] + part.nbytes > limit
                for rank in (part.source, part.target)
            ):
                last = _Batch()
                batches.append(last)
            last.copies.append(part)
            for rank in (part.source, part.target):
                last.staged[rank] = last.staged.get(rank, 0) + part.nbytes
    return tuple(tuple(batch.copies) for batch in batches)


def _cut(copy: Copy, limit: int) -> Iterator[Copy]:
    """The same copy in pieces of at most `limit` bytes, along its first dimensions."""
    if copy.nbytes <= limit:
        yield copy
        return
    dim = next((axis for axis, (start, stop) in enumerate(copy.source_region) if stop - start > 1), None)
    if dim is None:  # one element
        yield copy
        return
    length = copy.source_region[dim][1] - copy.source_region[dim][0]
    row = copy.nbytes // length
    step = max(1, limit // row)
    for offset in range(0, length, step):
        size = min(step, length - offset)
        boxes = [
            tuple(
                (start + offset, start + offset + size) if axis == dim else (start, stop)
                for axis, (start, stop) in enumerate(region)
            )
            for region in (copy.source_region, copy.target_region)
        ]
        yield from _cut(Copy(copy.name, copy.source, copy.target, *boxes, row * size), limit)
