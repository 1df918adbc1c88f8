"""Who is like whom, and a process that takes itself for any rank of a job."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.planning.job import chunks_in_flight
from megatron_dlm.planning.world import as_rank, distinct_places, place_of


@pytest.fixture(autouse=True)
def no_job():
    yield
    assert not dist.is_initialized()


def test_one_process_is_one_place():
    (place,) = distinct_places(ParallelConfig(), 1)
    assert (place.rank, place.alike, place.tensor, place.stage) == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("layout", "world", "engine", "count"),
    [
        (dict(tensor_model_parallel_size=4, pipeline_model_parallel_size=2), 64, None, 8),
        (dict(context_parallel_size=4), 8, None, 1),
        (dict(), 8, EngineConfig(rollout_tensor_model_parallel_size=2), 2),
        (dict(expert_model_parallel_size=4, expert_tensor_parallel_size=1), 16, None, 4),
        (dict(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1), 8, None, 4),
    ],
)
def test_places_stand_for_all_ranks(layout, world, engine, count):
    places = distinct_places(ParallelConfig(**layout), world, engine)
    assert len(places) == count
    assert sum(place.alike for place in places) == world


def test_coordinates_are_those_of_the_groups():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )  # fmt: skip
    for rank in range(8):
        place = place_of(rank, 8, parallel)
        with as_rank(rank, 8, parallel) as groups:
            found = groups.pg_collection
            assert (groups.rank, groups.world_size, groups.tp_rank, groups.pp_rank) == (
                rank, 8, place.tensor, place.stage,
            )  # fmt: skip
            assert (found.ep.rank(), found.expt_tp.rank()) == (place.expert, place.expert_tensor)


def test_tensors_have_sizes_and_no_memory():
    with as_rank(5, 1024, ParallelConfig(tensor_model_parallel_size=8)) as groups:
        large = torch.zeros(2**50, device="cpu")
        assert large.untyped_storage().nbytes() == 2**52
        dist.all_reduce(large, group=groups.tp)
    assert torch.zeros(2).sum() == 0


def test_a_process_of_a_job_cannot_plan():
    with as_rank(0, 1, ParallelConfig()):
        with pytest.raises(RuntimeError, match="joined no job"), as_rank(0, 1, ParallelConfig()):
            pass


def test_without_a_pipeline_one_row_is_in_flight():
    assert chunks_in_flight(0, 1, 1, 100) == (1,)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
def test_earlier_stages_have_more_in_flight(microbatches):
    found = [chunks_in_flight(stage, 4, 1, microbatches) for stage in range(4)]
    assert found == [(min(microbatches, 4 - stage),) for stage in range(4)]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("virtual", [2, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_interleaved_chunks_in_flight_are_those_of_a_played_schedule(stages, virtual, rounds):
    """Forward passes and backward passes one by one, in megatron-core's order: chunk 0 first, backward the last."""
    microbatches = stages * rounds
    for stage in range(stages):
        total = microbatches * virtual
        warmup = min(total, (stages - stage - 1) * 2 + (virtual - 1) * stages)
        there, most, peak = [0] * virtual, 0, None
        forward, backward = 0, 0
        while backward < total:
            if forward < min(total, warmup + backward + 1):
                there[forward // stages % virtual] += 1
                forward += 1
                if sum(there) > most:
                    most, peak = sum(there), tuple(there)
            else:
                there[virtual - 1 - backward // stages % virtual] -= 1
                backward += 1
        assert chunks_in_flight(stage, stages, virtual, microbatches) == peak
        assert math.isclose(sum(peak), most)
