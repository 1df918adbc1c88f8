"""One process that takes itself for any rank of a job of any size.

    for place in distinct_places(parallel, world_size):
        with as_rank(place.rank, world_size, parallel) as groups:
            state = ...                    # real models, DDP buffers and optimizers over tensors without data

The process groups are torch's fake ones, whose operations return at once; within the context every new tensor is a
fake one, which has a shape, a type and a storage of so many bytes, and no memory. Generators of random numbers, which
have no fakes, are left alone meanwhile.

Ranks of one place hold shards of the same sizes and do the same work: replicas, and context-parallel ranks, which get
parts of a row of equal cost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dlm import platform
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.rollout import EngineConfig


@dataclass(frozen=True, slots=True)
class Place:
    """A rank that stands for all that are like it.

    Attributes:
        rank: the first of them. alike: their number.
        tensor, stage, expert, expert_tensor: coordinates of the training layout.
        engine, engine_expert: coordinates of the rollout layout (0 where there is none).
    """

    rank: int
    alike: int
    tensor: int
    stage: int
    expert: int = 0
    expert_tensor: int = 0
    engine: int = 0
    engine_expert: int = 0

    @property
    def key(self) -> tuple[int, ...]:
        return (self.tensor, self.stage, self.expert, self.expert_tensor, self.engine, self.engine_expert)


def place_of(rank: int, world_size: int, parallel: ParallelConfig, engine: EngineConfig | None = None) -> Place:
    """Where a rank stands in both layouts: tensor parts vary fastest, pipeline stages slowest; for experts the
    expert-tensor parts, then the experts. Engines are ranks that follow each other.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    experts = parallel.expert_model_parallel_size
    shard = tensor if parallel.expert_tensor_parallel_size is None else parallel.expert_tensor_parallel_size
    rollout, rollout_experts = engine_sizes(parallel, engine)
    return Place(
        rank,
        1,
        rank % tensor,
        rank // (world_size // stages),
        rank // shard % experts,
        rank % shard,
        rank % rollout,
        rank % (rollout_experts * shard) if rollout_experts > 1 else 0,
    )


def engine_sizes(parallel: ParallelConfig, engine: EngineConfig | None) -> tuple[int, int]:
    """Tensor- and expert-parallel size of the rollout layout; (1, 1) without one."""
    if engine is None:
        return 1, 1
    return (
        engine.rollout_tensor_model_parallel_size or parallel.tensor_model_parallel_size,
        engine.rollout_expert_model_parallel_size or parallel.expert_model_parallel_size,
    )


def distinct_places(parallel: ParallelConfig, world_size: int, engine: EngineConfig | None = None) -> list[Place]:
    """One rank for each combination of coordinates that occurs, in order of rank."""
    found: dict[tuple[int, ...], Place] = {}
    for rank in range(world_size):
        place = place_of(rank, world_size, parallel, engine)
        known = found.get(place.key)
        found[place.key] = place if known is None else _one_more(known)
    return list(found.values())


def _one_more(place: Place) -> Place:
    return Place(place.rank, place.alike + 1, *place.key)


@contextlib.contextmanager
def as_rank(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator:
    """Be `rank` of a job of `world_size` processes, with tensors without data; yields its `Groups`.

    Raises:
        RuntimeError: this process belongs to a real job.
        ConfigError: as `parallel.groups.initialize`.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan is made by a process that has joined no job")
    # Importing them registers the fake backend, and what its operations make of tensors without data.
    import torch.distributed._tools.fake_collectives  # noqa: F401
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.install()
    from megatron_dlm.parallel import groups as process_groups

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        groups = process_groups.initialize(parallel, seed=1)
        with (
            _no_randomness(),
            mock.patch.object(platform, "backend", lambda: "fake"),
            mock.patch.object(dist, "all_gather_object", _the_same_everywhere),
            FakeTensorMode(),
        ):
            yield groups
    finally:
        process_groups.destroy()


def _the_same_everywhere(found: list, mine: object, group: object = None) -> None:
    """Objects travel as bytes, which fake tensors do not have; what megatron-core asks is alike on all ranks."""
    found[:] = [mine] * len(found)


@contextlib.contextmanager
def _no_randomness() -> Iterator[None]:
    """megatron-core saves, compares and restores generators around weights that are drawn and layers that are computed
    again; a generator's state cannot be a tensor without data.
    """
    from megatron.core.tensor_parallel import random

    with (
        mock.patch.object(random, "_CUDA_RNG_STATE_TRACKER", _NoTracker()),
        mock.patch.object(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        mock.patch.object(random, "_get_all_rng_states", lambda: (None, None, None)),
        mock.patch.object(random, "_set_all_rng_states", lambda *_: None),
    ):
        yield


class _NoTracker:
    """Stands where megatron-core keeps generator states."""

    use_cudagraphable_rng = False

    def get_states(self) -> dict:
        return {}

    def set_states(self, _: dict) -> None: ...

    def reset(self) -> None: ...

    def add(self, *_: object) -> None: ...

    def is_initialized(self) -> bool:
        return True

    def fork(self, *_: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()
