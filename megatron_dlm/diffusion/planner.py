"""Partition first, then pack: which responses make an update, and which of them share a row.

1. `partition` splits the shuffled responses into updates of nearly equal size.
2. `pack` fills the rows of one update: members of a group stay together (their prompt is stored once), the longest
   bundle goes first, into the emptiest row that can take it. Every data-parallel rank gets the same number of rows, all
   of one length.

Pure functions of lengths and keys, identical on every rank; nothing here touches tokens, devices or process groups.
Losses are sums of weight x loss with weights computed from the whole update, so nothing that is decided here can change
a gradient (tests/diffusion/test_planner.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.diffusion.keys import permutation

ROW_MULTIPLE = 64  # rows are rounded up to this many tokens, so that few shapes occur


@dataclass(frozen=True, slots=True)
class Load:
    """What one item asks of a row: `shared` prompt tokens once per group and row, and `own` tokens."""

    group: str
    shared: int
    own: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows of one update.

    Attributes:
        ranks: for each data-parallel rank its rows, each a tuple of item indices; the same number of rows for every
            rank (empty rows fill up).
        length: T, tokens of every row.
    """

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    length: int

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self.ranks)


def partition(n: int, num_updates: int, stream: int) -> list[list[int]]:
    """Shuffle range(n) and cut it into at most `num_updates` non-empty updates whose sizes differ by one at most; none
    for n = 0.
    """
    order = permutation(stream, n).tolist()
    num_updates = max(1, min(num_updates, n))
    cuts = [n * i // num_updates for i in range(num_updates + 1)] if n else []
    return [order[a:b] for a, b in zip(cuts, cuts[1:])]


def check_budget(largest: int, budget: int) -> None:
    """Refuse a row budget that the largest possible item does not fit; trainers ask before they start.

    Raises:
        ConfigError: it does not fit.
    """
    if largest > budget:
        raise ConfigError(
            f"--max-tokens-per-row {budget} is too small: one sample may need {largest} tokens with its noisy copies. "
            f"Use at least {largest}, or shorten the samples."
        )


@dataclass(slots=True)
class _Bundle:
    """Items of one group that travel together."""

    items: list[int]
    tokens: int


def pack(loads: list[Load], budget: int, num_ranks: int = 1, multiple_of: int = 1) -> Plan:
    """Rows for one update.

    Args:
        loads: one per item.
        budget: most tokens per row.
        num_ranks: data-parallel size.
        multiple_of: T is rounded up to a multiple of this (sequence parallelism, kernels), but never above the budget's
            own multiple.

    Raises:
        ConfigError: an item does not fit a row.
    """
    largest = max((load.shared + load.own for load in loads), default=0)
    check_budget(largest, budget)
    bundles = sorted(
        _bundles(loads, min(budget, _fair_share(loads, largest, num_ranks))),
        key=lambda bundle: (-bundle.tokens, bundle.items),
    )
    num_rows = max(num_ranks, _round_up(math.ceil(sum(b.tokens for b in bundles) / budget), num_ranks))
    while (rows := _fill(bundles, num_rows, budget)) is None:
        num_rows += num_ranks
    rows.sort(key=lambda row: -row.tokens)
    length = _round_up(max(row.tokens for row in rows), multiple_of) or multiple_of
    return Plan(tuple(tuple(tuple(row.items) for row in rows[rank::num_ranks]) for rank in range(num_ranks)), length)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _fair_share(loads: list[Load], largest: int, num_ranks: int) -> int:
    """Tokens that no bundle should exceed, so that every rank has something to do although a cut group stores its
    prompt again.
    """
    total = sum(load.own for load in loads) + sum({load.group: load.shared for load in loads}.values())
    return max(largest, -(-total // num_ranks))


def _bundles(loads: list[Load], budget: int) -> list[_Bundle]:
    """Items of a group together, cut where they exceed the budget."""
    groups: dict[str, list[int]] = {}
    for index, load in enumerate(loads):
        groups.setdefault(load.group, []).append(index)
    bundles = []
    for members in groups.values():
        shared = loads[members[0]].shared
        bundle = _Bundle([], shared)
        for index in members:
            if bundle.items and bundle.tokens + loads[index].own > budget:
                bundles.append(bundle)
                bundle = _Bundle([], shared)
            bundle.items.append(index)
            bundle.tokens += loads[index].own
        bundles.append(bundle)
    return bundles


def _fill(bundles: list[_Bundle], num_rows: int, budget: int) -> list[_Bundle] | None:
    """Longest bundle first into the emptiest row; None when a bundle fits no row."""
    rows = [_Bundle([], 0) for _ in range(num_rows)]
    for bundle in bundles:
        row = min(rows, key=lambda row: row.tokens)
        if row.tokens + bundle.tokens > budget:
            return None
        row.items += bundle.items
        row.tokens += bundle.tokens
    return rows
