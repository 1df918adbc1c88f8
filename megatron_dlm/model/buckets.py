"""Sequences of similar length, attended to together.

One call of scaled dot-product attention wants one shape, so what it serves is padded to its longest member. Sorted by
length and cut where the padding would become dear, the calls stay few and no short sequence pays for a long one.
"""

from __future__ import annotations

from collections.abc import Sequence

RATIO = 1.3


def by_length(lengths: Sequence[int], floor: int) -> list[list[int]]:
    """Cut sequences into buckets, each of which is padded to its longest member.

    Args:
        lengths: of the sequences.
        floor: shorter ones count as this long: a further call would cost more than the padding.

    Returns:
        Indices into `lengths`, longest first. The longest of a bucket is at most RATIO times its shortest, or `floor`.
    """
    buckets: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not buckets or RATIO * max(lengths[index], floor) < longest:
            buckets.append([])
            longest = lengths[index]
        buckets[-1].append(index)
    return buckets
