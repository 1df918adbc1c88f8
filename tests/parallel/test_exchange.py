from __future__ import annotations

import pytest

from megatron_dlm.config.parallel import ParallelConfig
from tests.harness import pool


def exchange(tp: int) -> tuple:
    import torch.distributed as dist

    from megatron_dlm.parallel.exchange import broadcast_object, exchange_objects, gather_objects, most_anywhere
    from megatron_dlm.parallel.groups import initialize

    groups = initialize(ParallelConfig(tensor_model_parallel_size=tp), seed=1)
    here, size, rank = groups.dp, groups.dp_size, groups.dp_rank
    outgoing = {to: [f"{rank}->{to} #{n}" * 10 for n in range((rank + to) % 3)] for to in range(size)}
    received = exchange_objects(outgoing, here)
    nothing = exchange_objects({}, here)
    return (
        dist.get_process_group_ranks(here),
        rank,
        received,
        nothing,
        gather_objects(("from", rank), here),
        broadcast_object(rank, size - 1, here),
        most_anywhere(groups.rank, -groups.rank, 1 << 40),
    )


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_objects_reach_whom_they_were_sent_to(world: int, tp: int) -> None:
    for ranks, rank, received, nothing, gathered, broadcast, most in pool(world).run(exchange, tp):
        assert received == [
            f"{sender}->{rank} #{n}" * 10 for sender in range(len(ranks)) for n in range((sender + rank) % 3)
        ]
        assert nothing == []
        assert gathered == [("from", other) for other in range(len(ranks))]
        assert broadcast == len(ranks) - 1
        assert most == [world - 1, 0, 1 << 40]


def marks(rank_that_sets: int) -> list[bool]:
    import torch.distributed as dist

    from megatron_dlm.parallel.exchange import anywhere
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=1)
    return anywhere(False, dist.get_rank() == rank_that_sets, dist.get_rank() == 0)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_mark_of_one_rank_is_everybodys(rank: int) -> None:
    assert pool(2).run(marks, rank) == [[False, rank < 2, True]] * 2


def to_a_stranger() -> None:
    from megatron_dlm.parallel.exchange import exchange_objects
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=1)
    with pytest.raises(ValueError, match="not all ranks"):
        exchange_objects({5: ["x"]})


def test_unknown_destination() -> None:
    pool(1).run(to_a_stranger)


def try_on_ranks() -> tuple[bool, str]:
    """With kernels that are broken on the second rank alone: what 'auto' is, and what is said by name."""
    import torch
    import torch.distributed as dist

    from megatron_dlm.config.errors import DependencyError
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel import self_test
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=1)
    one = torch.ones(2)
    work = lambda: [("its output", one * (1 + dist.get_rank()), one)]
    auto = self_test.passed("--loss-head", "auto", "torch", torch.float32, work)
    try:
        self_test.passed("--loss-head", "triton", "torch", torch.float32, work)
    except DependencyError as error:
        return auto, str(error)
    return auto, ""


def test_ranks_choose_alike_whose_kernels_differ() -> None:
    first, second = pool(2).run(try_on_ranks)
    assert first == second
    assert not first[0] and "differs by 1.0e+00" in first[1]
