"""Processes that do not have the same Transformer Engine are told so, all of them, before they work together."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import DependencyError
from tests.harness import pool

BROKEN = "one that cannot be imported (ImportError: libcudart is not here)"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([("a", "none")] * 3, None),
        ([("a", "2.8.0")] * 2 + [("b", "2.8.0")], None),
        ([("a", "2.8.0")] * 2 + [("b", "2.7.0")], ["the host b (process 2) has 2.7.0, a 2.8.0"]),
        ([("a", "none")] + [("b", "2.8.0")] * 2, ["the host a (process 0) has none, b 2.8.0"]),
        ([("a", "2.8.0"), ("a", BROKEN), ("a", "2.8.0")], ["process 1 on a has one that", "libcudart", "a 2.8.0"]),
    ],
)
def test_the_odd_host_is_named(found: list[tuple[str, str]], words: list[str] | None) -> None:
    from megatron_dlm.parallel.alike import differing

    error = differing(found)
    assert (error is None) == (words is None)
    for word in words or ():
        assert word in str(error)


def compared(versions: list[str]) -> tuple:
    from unittest import mock

    import torch.distributed as dist

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel import alike
    from megatron_dlm.parallel.groups import initialize

    with (
        mock.patch.object(alike, "_compared", False),
        mock.patch.object(alike.te, "found", lambda: versions[dist.get_rank()]),
    ):
        try:
            initialize(ParallelConfig(), seed=1)
        except DependencyError as error:
            return str(error), error.rank, error.told
    return ()


def test_all_ranks_hear_of_it() -> None:
    (one, *first), (other, *second) = pool(2).run(compared, ["2.8.0", "none"])
    assert one == other and "process 1 on " in one
    assert first == [1, False] and second == [1, True]
