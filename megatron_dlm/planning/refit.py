"""The traffic of a refit: which bytes each rank sends and receives when the engine gets new weights.

What a rank trains and what its engine needs is read off the built models, as rollout/refit.py does it in a run; who
sends what to whom is the real plan (rollout/reshard_plan.py). Ranks that are alike have the same shards, so the shards
of one are those of all; of a large job, a smaller one with the same model-parallel sizes is planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn

from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.model.fp8 import fp8_layers
from megatron_dlm.planning.measure import weights_in_fp8
from megatron_dlm.planning.precision import BF16, Precision
from megatron_dlm.planning.world import Place, engine_sizes, place_of
from megatron_dlm.rollout.refit import _first_expert, _is_buffer, _slots, training_shards, training_tensors
from megatron_dlm.rollout.reshard_plan import Shard, bytes_of, canonical, is_expert, plan_refit
from megatron_dlm.training.state import TrainState

MOST_RANKS = 128  # that a plan is made for
MOST_SHARDS = 100_000  # of all their engines


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of the rollout model, whose cut is known from the trained one of that name. `tensor`, `expert_tensor`:
    (index, parts) of this rank in the groups that share tensors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    tensor: tuple[int, int]
    expert_tensor: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Weights:
    """What one rank trains, and what its engine needs. `saved`: bytes by which what its engine keeps is less than what
    it is given, because it keeps FP8.
    """

    trained: tuple[Shard, ...]
    wanted: tuple[Wanted, ...]
    saved: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one rank in one refit, in bytes.

    Attributes:
        shared: of the engine's weights that are training storage. own: of those that have storage of their own.
        received, sent, copied: from and to other ranks, and within the rank. `sent` is a mean over alike ranks.
    """

    shared: int
    own: int
    received: int
    sent: int
    copied: int


def weights_of(state: TrainState, model: nn.Module, precision: Precision = BF16) -> Weights:
    """Args:
    model: of the engine of this rank, on the meta device.
    precision: of the trained model. Weights that it keeps in FP8 are computed for the engine.
    """
    here = model.pg_collection
    place = lambda group: (group.rank(), group.size())
    rounded = {canonical(name, _first_expert(model)): layer for name, layer in fp8_layers(model)}
    type_of = lambda slot: rounded[slot.name].wide_dtype if slot.name in rounded else slot.owner[slot.key].dtype
    trained = _computed(training_shards(state, model), state, model, precision)
    return Weights(
        tuple(replace(shard, computed=True) if shard.name in rounded else shard for shard in trained),
        tuple(
            Wanted(
                slot.name,
                tuple(slot.owner[slot.key].shape),
                type_of(slot),
                _is_buffer(slot),
                place(here.tp),
                place(here.expt_tp),
            )
            for slot in _slots(model)
        ),
        sum(
            layer.weight.numel() * layer.wide_dtype.itemsize - layer.weight.nbytes - layer.weight_scale.nbytes
            for layer in rounded.values()
        ),
    )


def _computed(shards: list[Shard], state: TrainState, model: nn.Module, precision: Precision) -> list[Shard]:
    """Noted as such where the trained weights are in FP8."""
    if not precision.gather:
        return shards
    kept = {id(weight) for weight in weights_in_fp8(state, precision)}
    found = {name for name, tensor in training_tensors(state, model).items() if id(tensor) in kept}
    return [replace(shard, computed=True) if shard.name in found else shard for shard in shards]


def own_bytes(weights: Weights) -> int:
    """Of the engine's weights that are not training storage of the rank: without knowing the other ranks."""
    trained = {shard.name: shard for shard in weights.trained}
    needs = _needed(weights, trained)
    kept = {name: shard.part for name, shard in trained.items() if not shard.computed}
    shared = sum(bytes_of(shard) for shard in needs if shard.name in kept and shard.part == kept[shard.name])
    return sum(map(bytes_of, needs)) - shared - weights.saved


def refit_traffic(
    weights: Mapping[tuple[int, ...], tuple[Place, Weights]],
    parallel: ParallelConfig,
    engine: EngineConfig,
    world_size: int,
    ranks_per_host: int,
) -> dict[tuple[int, ...], Traffic]:
    """Traffic of each place.

    Args:
        weights: by `Place.key`, of all distinct places.
    """
    most = max(len(one.wanted) for _, one in weights.values())
    ranks = _ranks(parallel, engine, world_size, min(MOST_RANKS, MOST_SHARDS // max(1, most)))
    keys = [place_of(rank, ranks, parallel, engine).key for rank in range(ranks)]
    if any(key not in weights for key in keys):
        ranks, keys = world_size, [place_of(rank, world_size, parallel, engine).key for rank in range(world_size)]
    known = {shard.name: shard for _, one in weights.values() for shard in one.trained}
    needs = {key: _needed(one, known) for key, (_, one) in weights.items()}
    plan = plan_refit(
        [weights[key][1].trained for key in keys],
        [needs[key] for key in keys],
        engine.refit_bucket_mib * 2**20,
        ranks_per_host,
    )
    received, sent, copied = [0] * ranks, [0] * ranks, [0] * ranks
    for copy in chain.from_iterable(plan.batches):
        received[copy.target] += copy.nbytes
        sent[copy.source] += copy.nbytes
    for copy in plan.local:
        copied[copy.target] += copy.nbytes
    found = {}
    for key in weights:
        alike = [rank for rank in range(ranks) if keys[rank] == key]
        if not alike:
            continue
        first = alike[0]
        shared = sum(bytes_of(shard) for shard in needs[key] if shard.name in plan.shared[first])
        whole = sum(bytes_of(shard) for shard in needs[key])
        mean_sent = round(sum(sent[rank] for rank in alike) / len(alike))
        found[key] = Traffic(shared, whole - shared - weights[key][1].saved, received[first], mean_sent, copied[first])
    return found


def _ranks(parallel: ParallelConfig, engine: EngineConfig, world_size: int, most: int) -> int:
    """The largest job of the same model-parallel sizes with at most so many ranks, at least one of each."""
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shard = tensor if parallel.expert_tensor_parallel_size is None else parallel.expert_tensor_parallel_size
    rollout, rollout_experts = engine_sizes(parallel, engine)
    unit = math.lcm(
        tensor * parallel.context_parallel_size * stages,
        parallel.expert_model_parallel_size * shard * stages,
        rollout * stages,
        rollout_experts,
    )
    return min(world_size, max(unit, most // unit * unit))


def _needed(weights: Weights, known: Mapping[str, Shard]) -> list[Shard]:
    """As rollout/refit.py describes an engine's tensors. Buffers that only the engine has are its own affair."""
    shards = []
    for one in weights.wanted:
        trained = known.get(one.name)
        if trained is None and one.is_buffer:
            continue
        if trained is None or trained.dim is None:
            shards.append(Shard(one.name, one.shape, one.dtype))
            continue
        index, parts = one.expert_tensor if is_expert(one.name) else one.tensor
        shards.append(replace(trained, shape=one.shape, dtype=one.dtype, index=index, parts=parts))
    return shards
