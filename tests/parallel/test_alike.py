"""Processes that do not have the same Transformer Engine are told so, all of them, before they work together."""

from __future__ import annotations

import pytest

OLD, NEW, NONE = ("2.7.0", "2.7.0"), ("2.8.0", "2.8.0"), (None, "none")
BROKEN = (None, "one that cannot be imported (ImportError: libcudart is not here)")
OTHERWISE = (None, "one that cannot be imported (OSError: /scratch/b/libte.so)")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([("a", *NONE)] * 3, None),
        ([("a", *NEW)] * 2 + [("b", *NEW)], None),
        ([("a", *NONE), ("b", *BROKEN), ("c", *OTHERWISE)], None),  # hidden, so all do without
        ([("a", *NEW)] * 2 + [("b", *OLD)], ["the host b (process 2) has 2.7.0, while a has 2.8.0."]),
        ([("a", *NONE)] + [("b", *NEW)] * 2, ["the host a (process 0) has none, while b has 2.8.0."]),
        ([("a", *NEW), ("a", *BROKEN)], ["process 1 on a has one that", "libcudart", ", while process 0 has 2.8.0."]),
        ([("a", *BROKEN), ("b", *NEW), ("c", *NONE)], ["the host b (process 1) has 2.8.0, while a has one that"]),
    ],
)
def test_the_odd_host_is_named(found: list[tuple], words: list[str] | None) -> None:
    from megatron_dlm.parallel.alike import differing

    error = differing(found)
    assert (error is None) == (words is None)
    for word in words or ():
        assert word in str(error)
