"""What the commands share, over several processes."""

from __future__ import annotations

import pytest

from tests.harness import pool


def checked(finders: tuple[int, ...]) -> tuple[str, bool] | int:
    """A check in which some ranks find a mistake of their own: what is raised here and whether another tells it, or
    what the check returns."""
    import torch.distributed as dist

    from megatron_dlm.commands.common import together
    from megatron_dlm.config.errors import ConfigError, UserError
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=1)
    rank = dist.get_rank()

    def check() -> int:
        if rank in finders:
            raise ConfigError(f"host {rank} has no python")
        return 10 + rank

    try:
        return together(check)
    except UserError as error:
        return str(error), error.told


@pytest.mark.parametrize("finders", [(), (0,), (1,), (0, 1)])
def test_a_mistake_that_any_rank_finds_is_raised_on_all_and_told_by_one(finders: tuple[int, ...]) -> None:
    found = pool(2).run(checked, finders)
    if not finders:
        assert found == [10, 11]
    else:
        assert found == [(f"host {finders[0]} has no python", rank != 0) for rank in range(2)]


def isolated(*levels: str | None) -> str | None:
    """What ranks say whose hosts offer these levels."""
    import torch.distributed as dist

    from megatron_dlm.commands.common import isolation_of
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=1)

    class Code:
        def check(self, prompts: list, verifier: str) -> str | None:
            assert (prompts, verifier) == ([], "auto")
            return levels[dist.get_rank()]

    return isolation_of(Code(), [], "auto")


def test_all_isolation_that_hosts_offer_is_told() -> None:
    assert pool(2).run(isolated, None, None) == [None, None]
    assert pool(2).run(isolated, "In a.", "In a.") == ["In a.", "In a."]
    assert pool(2).run(isolated, "In a.", "In b.") == ["On 1 of 2 processes: In a. On 1 of 2 processes: In b."] * 2


def broken(rank: int) -> int:
    """What is no mistake of the user's keeps its traceback, where it happens."""
    from megatron_dlm.commands.common import together
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=1)
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 // rank)
    return rank


def test_other_errors_are_left_alone() -> None:
    assert pool(1).run(broken, 0) == [0]
