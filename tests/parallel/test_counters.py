from __future__ import annotations

import pytest

from tests.harness import pool


def count_together(rounds: int) -> tuple[list[list[int]], list[str]]:
    """Several sets of counters, each left by some ranks while others still count; and the keys that are left over."""
    import torch.distributed as dist

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.counters import Counters
    from megatron_dlm.parallel.groups import initialize

    groups = initialize(ParallelConfig(), seed=1)
    before = dist.distributed_c10d._get_default_store().num_keys()
    told = []
    for number in range(rounds):
        counters = Counters("same name", groups.world_size)
        told.append([counters.add("n", 1) for _ in range(5 * (1 + (groups.rank + number) % 2))])
        assert counters.read("other") == 0
        counters.leave(["n", "other", "never used"])
    dist.barrier()
    left = dist.distributed_c10d._get_default_store().num_keys() - before
    dist.barrier()
    return told, left


@pytest.mark.parametrize("world", [2, 4])
def test_everybody_counts_and_nothing_is_left(world: int) -> None:
    results = pool(world).run(count_together, 3)
    for number in range(3):
        together = sorted(value for told, _ in results for value in told[number])
        assert together == list(range(1, len(together) + 1)) and len(together) > 5 * world
    assert all(left <= world for _, left in results)  # what barriers keep there


def test_one_process_counts_by_itself(monkeypatch) -> None:
    from megatron_dlm.parallel import counters as module

    monkeypatch.setattr(module.distributed_c10d, "_get_default_store", None)
    counters = module.Counters("x", 1)
    assert [counters.add("a", 2), counters.add("b", 1), counters.add("a", 3), counters.read("a")] == [2, 1, 5, 5]
    counters.leave(["a", "b"])
