from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.config.parallel import ParallelConfig
from tests.harness import pool


def layout(tp: int, pp: int) -> dict:
    from megatron_dlm.parallel.groups import initialize, rollout_groups

    groups = initialize(ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp), seed=1)
    rollout = rollout_groups(groups)
    return {
        "sizes": (groups.tp_size, groups.pp_size, groups.dp_size),
        "place": (groups.tp_rank, groups.pp_rank, groups.dp_rank),
        "ends": (groups.is_pipeline_first, groups.is_pipeline_last, groups.is_main),
        "rollout": (rollout.tp_size, rollout.pp_size, rollout.dp_size),
        "tp": dist.get_process_group_ranks(groups.tp),
        "rollout_tp": dist.get_process_group_ranks(rollout.tp),
        "replicas": dist.get_process_group_ranks(rollout.dp),
    }


@pytest.mark.parametrize(("world", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2), (4, 2, 1)])
def test_layout(world: int, tp: int, pp: int) -> None:
    ranks = pool(world).run(layout, tp, pp)
    dp = world // (tp * pp)
    places = {answer["place"] for answer in ranks}
    assert places == {(t, p, d) for t in range(tp) for p in range(pp) for d in range(dp)}
    for rank, answer in enumerate(ranks):
        assert answer["sizes"] == (tp, pp, dp)
        stage = answer["place"][1]
        assert answer["ends"] == (stage == 0, stage == pp - 1, rank == 0)
        assert answer["rollout"] == (tp, 1, world // tp)
        assert answer["rollout_tp"] == answer["tp"]
        assert answer["replicas"] == [other for other in range(world) if ranks[other]["place"][0] == answer["place"][0]]


def timeouts(parallel: dict, tp: int | None, ep: int | None) -> list[float]:
    """Seconds that the groups of the rollout layout wait, those that it has of its own."""
    from megatron_dlm.parallel.groups import initialize, rollout_groups

    collection = rollout_groups(initialize(ParallelConfig(**parallel), seed=1), tp, ep).pg_collection
    groups = [collection.tp, collection.pp, collection.dp, collection.ep, collection.expt_tp, collection.expt_dp]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize("tp, ep", [(2, None), (2, 2)])
def test_groups_of_the_rollout_wait_as_long_as_those_of_training(tp: int, ep: int | None) -> None:
    assert pool(2).run(timeouts, dict(distributed_timeout_minutes=7), tp, ep) == [[420.0] * 6] * 2


def own_layout(parallel: dict, tp: int | None, ep: int | None) -> dict:
    from megatron_dlm.parallel.groups import initialize, rollout_groups

    groups = initialize(ParallelConfig(**parallel), seed=1)
    rollout = rollout_groups(groups, tp, ep)
    pgs = rollout.pg_collection
    names = ("tp", "pp", "dp", "dp_cp", "ep", "expt_tp", "tp_ep", "expt_dp", "cp", "mp")
    return {name: dist.get_process_group_ranks(getattr(pgs, name)) for name in names} | {
        "sizes": (rollout.tp_size, rollout.pp_size, rollout.dp_size, rollout.ep_size),
        "replica": rollout.dp_rank,
        "same": rollout is groups,
        "same experts": pgs.ep is groups.pg_collection.ep,
    }


EP2_WHOLE = dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)


@pytest.mark.parametrize(
    ("parallel", "tp", "ep", "tensor", "experts", "shard"),
    [
        (dict(), 2, None, 2, 1, 2),
        (dict(), None, 2, 1, 2, 1),
        (dict(tensor_model_parallel_size=2), 1, None, 1, 1, 1),
        (dict(tensor_model_parallel_size=2), 4, None, 4, 1, 4),
        (dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4, 1, 4, 1, 4),
        (dict(EP2_WHOLE), None, 1, 1, 1, 1),
        (dict(EP2_WHOLE), 2, None, 2, 2, 1),
        (dict(EP2_WHOLE, pipeline_model_parallel_size=2), None, None, 1, 2, 1),
        (dict(expert_model_parallel_size=2, tensor_model_parallel_size=2), None, None, 2, 2, 2),
        (dict(expert_model_parallel_size=2, tensor_model_parallel_size=2), 1, None, 1, 2, 2),
        (dict(expert_model_parallel_size=2, tensor_model_parallel_size=2), 2, 4, 2, 4, 1),
    ],
)
def test_rollouts_have_a_layout_of_their_own(parallel, tp, ep, tensor: int, experts: int, shard: int) -> None:
    world, size = range(4), experts * shard
    for rank, answer in enumerate(pool(4).run(own_layout, parallel, tp, ep)):
        place, block = rank % size, rank - rank % size
        expected = {
            "tp": [other for other in world if other // tensor == rank // tensor],
            "dp": [other for other in world if other % tensor == rank % tensor],
            "expt_tp": [other for other in world if other // shard == rank // shard],
            "ep": list(range(block + place % shard, block + size, shard)),
            "tp_ep": list(range(block, block + size)),
            "expt_dp": [other for other in world if other % size == place],
            "pp": [rank],
            "cp": [rank],
        }
        expected |= {"dp_cp": expected["dp"], "mp": expected["tp"]}
        assert {name: answer[name] for name in expected} == expected
        assert answer["sizes"] == (tensor, 1, 4 // tensor, experts) and answer["replica"] == rank // tensor
        alike = (tensor, experts) == tuple(
            parallel.get(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "expert")
        )
        assert answer["same"] == (alike and "pipeline_model_parallel_size" not in parallel)
        assert answer["same experts"] or not alike or experts == 1  # what training has already is not made again


def impossible(parallel: dict, tp: int | None, ep: int | None) -> str:
    with pytest.raises(ConfigError) as error:
        own_layout(parallel, tp, ep)
    return str(error.value)


def test_a_rollout_layout_that_does_not_divide_the_world() -> None:
    assert "2 processes" in pool(2).run(impossible, {}, 4, None)[0]
    assert "--rollout-expert-model-parallel-size 3" in pool(2).run(impossible, {}, None, 3)[1]


def refused(tp: int, pp: int) -> str:
    from megatron_dlm.parallel.groups import initialize

    with pytest.raises(ConfigError) as error:
        initialize(ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp), seed=1)
    return str(error.value)


def test_world_that_does_not_divide() -> None:
    assert "2 processes cannot be divided" in pool(2).run(refused, 2, 2)[0]


def seeds(tp: int, pp: int) -> tuple[float, float]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp), seed=7)
    replicated = torch.rand(()).item()
    with get_cuda_rng_tracker().fork():
        return replicated, torch.rand(()).item()


def test_tensor_ranks_draw_apart_inside_layers_only() -> None:
    (replicated, inside), (other_replicated, other_inside) = pool(2).run(seeds, 2, 1)
    assert replicated == other_replicated
    assert inside != other_inside


def compared(found: list[tuple]) -> tuple:
    """Processes that meet with these of Transformer Engine (tests/parallel/test_alike.py): what they are told."""
    from unittest import mock

    from megatron_dlm.parallel import alike
    from megatron_dlm.parallel.groups import initialize

    with (
        mock.patch.object(alike, "_compared", False),
        mock.patch.object(alike.te, "found", lambda: found[dist.get_rank()]),
    ):
        try:
            initialize(ParallelConfig(), seed=1)
        except DependencyError as error:
            return str(error), error.rank, error.told
    return ()


def test_all_ranks_hear_that_they_are_not_alike() -> None:
    (one, *first), (other, *second) = pool(2).run(compared, [("2.8.0", "2.8.0"), (None, "none")])
    assert one == other and "process 1 on " in one
    assert first == [1, False] and second == [1, True]
