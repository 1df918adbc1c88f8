from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.config.errors import ConfigError
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
