from __future__ import annotations

import pytest

from megatron_dlm.model.buckets import RATIO, by_length


@pytest.mark.parametrize(
    "lengths, floor, expected",
    [
        ([], 1, []),
        ([7], 1, [[0]]),
        ([5, 5, 5], 1, [[0, 1, 2]]),
        ([4, 100, 90, 5], 1, [[1, 2], [3, 0]]),
        ([4, 100, 90, 5], 200, [[1, 2, 3, 0]]),
        ([1, 60, 2, 300], 48, [[3], [1, 2, 0]]),
    ],
)
def test_buckets(lengths: list[int], floor: int, expected: list[list[int]]) -> None:
    assert by_length(lengths, floor) == expected


@pytest.mark.parametrize("floor", [1, 16, 1000])
def test_all_are_served_once_and_none_is_padded_far(floor: int) -> None:
    lengths = [(37 * n) % 211 + 1 for n in range(150)]
    buckets = by_length(lengths, floor)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(150))
    for bucket in buckets:
        held = [lengths[index] for index in bucket]
        assert max(held) == held[0] and held[0] <= RATIO * max(min(held), floor)
    assert (len(buckets) == 1) == (floor == 1000)
