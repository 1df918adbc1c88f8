"""Partition first, then pack: which responses make an update, and which of them share a row.

1. `partition` splits the shuffled responses into updates of nearly equal size.
2. `pack` fills the rows of one update: members of a group stay together (their prompt is stored once), the longest
   bundle goes first, into the emptiest row that can take it, or the fullest, if that makes rows shorter. Every
   data-parallel rank gets the same number of rows, all of one length, for which the layers' matrix products cost the
   same. What still differs is attention: within that length, bundles go to the rows, and rows to the ranks, that have
   least of it (`_balanced`, `_deal`). Items may come in parts (`pack_parts`, views.split_views), which go where there
   is room.

Pure functions of lengths and keys, identical on every rank; nothing here touches tokens, devices or process groups.
Losses are sums of weight x loss with weights computed from the whole update, so nothing that is decided here can change
a gradient (tests/diffusion/test_planner.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.diffusion.keys import permutation

ROW_MULTIPLE = 64  # rows are rounded up to this many tokens, so that few shapes occur
FLEX_TILE = 128  # queries, and keys, of a tile: what the kernels of FlexAttention are tuned for


def row_multiple(tensor_size: int, token_multiple: int = 1, attention: str = "dense") -> int:
    """Lengths of rows, and of a context-parallel rank's part of one, are multiples of this: few shapes, as many tokens
    for every rank of sequence parallelism, and whole tiles, which attention would otherwise fill up in every layer.

    Args:
        token_multiple: what a rank of sequence parallelism has is a multiple of this (FP8).
        attention: the backend of rows (model/attention_backends.py).
    """
    return math.lcm(FLEX_TILE if attention == "flex" else ROW_MULTIPLE, tensor_size * token_multiple)


@dataclass(frozen=True, slots=True)
class Load:
    """What one item asks of a row: `shared` prompt tokens once per group and row, and `own` tokens; and in how many
    pairs of a query and a key they stand, `shared_area` and `own_area`.
    """

    group: str
    shared: int
    own: int
    shared_area: int = 0
    own_area: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows of one update.

    Attributes:
        ranks: for each data-parallel rank its rows, each a tuple of item indices; the same number of rows for every
            rank (empty rows fill up).
        length: T, tokens of every row.
        parts: shaped like `ranks`, which part of the item each entry is; None where items are whole.
        tokens: those of all rows together, padding left out.
    """

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    length: int
    parts: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    tokens: int = 0

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self.ranks)


def partition(n: int, num_updates: int, stream: int | None) -> list[list[int]]:
    """Shuffle range(n), or leave its order where `stream` is None, and cut it into at most `num_updates` non-empty
    updates whose sizes differ by one at most; none for n = 0.
    """
    order = list(range(n)) if stream is None else permutation(stream, n).tolist()
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
    area: int = 0


def pack(loads: list[Load], budget: int, num_ranks: int = 1, multiple_of: int = 1, rows_multiple: int = 1) -> Plan:
    """Rows for one update.

    Args:
        loads: one per item.
        budget: most tokens per row.
        num_ranks: data-parallel size.
        multiple_of: T is rounded up to a multiple of this (sequence parallelism, kernels), but never above the budget's
            own multiple.
        rows_multiple: every rank gets a multiple of so many rows (interleaved pipeline stages). Groups are then cut
            where that leaves fewer tokens to compute, for rows that nobody fills are computed like others.

    Raises:
        ConfigError: an item does not fit a row.
    """
    largest = max((load.shared + load.own for load in loads), default=0)
    check_budget(largest, budget)
    unit = num_ranks * rows_multiple
    found = []
    for share in _shares(rows_multiple):
        most = max(largest, -(-_tokens(loads) // (num_ranks * share)))  # so that every rank has something to do
        bundles = _sorted(_bundles(loads, min(budget, most)))
        num_rows = max(unit, _round_up(math.ceil(sum(bundle.tokens for bundle in bundles) / budget), unit))
        while (rows := _fill(bundles, num_rows, budget)) is None:
            num_rows += unit
        rows, length = _tightened(bundles, rows, multiple_of)
        found.append((num_rows * length, share, length, bundles, rows))
    _, _, length, bundles, rows = min(found, key=lambda one: one[:2])
    rows = _balanced(bundles, len(rows), min(length, budget)) or rows
    dealt = tuple(tuple(tuple(row.items) for row in mine) for mine in _deal(rows, num_ranks))
    return Plan(dealt, length, tokens=sum(bundle.tokens for bundle in bundles))


def pack_parts(
    items: Sequence[Sequence[Load]],
    budget: int,
    num_ranks: int = 1,
    multiple_of: int = 1,
    together: bool = False,
    rows_multiple: int = 1,
) -> Plan:
    """As `pack`, for items that come in parts. A row may hold several parts of one item.

    Args:
        items: for each item the loads of its parts.
        together: all parts of an item go to one data-parallel rank, for what is computed from all tokens of a response.
    """
    loads = [load for parts in items for load in parts]
    places = [(item, part) for item, parts in enumerate(items) for part in range(len(parts))]
    if together:
        plan = _pack_together(loads, [item for item, _ in places], budget, num_ranks, multiple_of, rows_multiple)
    else:
        plan = pack(loads, budget, num_ranks, multiple_of, rows_multiple)
    named = lambda which: tuple(
        tuple(tuple(places[index][which] for index in row) for row in rows) for rows in plan.ranks
    )
    return Plan(named(0), plan.length, named(1), plan.tokens)


def _pack_together(
    loads: list[Load], owners: Sequence[int], budget: int, num_ranks: int, multiple_of: int, rows_multiple: int
) -> Plan:
    """Owners are dealt out, the largest first, to the rank that has fewest tokens; then each rank fills its rows. An
    owner that is larger than a fair share makes the other ranks wait for it.

    Args:
        owners: of each load, the number of the item that it is a part of.
    """
    check_budget(max((load.shared + load.own for load in loads), default=0), budget)
    mine: dict[int, list[int]] = {}
    for index, owner in enumerate(owners):
        mine.setdefault(owner, []).append(index)
    size = {owner: sum(loads[index].shared + loads[index].own for index in parts) for owner, parts in mine.items()}
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for owner in sorted(mine, key=lambda owner: (-size[owner], owner)):
        rank = min(range(num_ranks), key=tokens.__getitem__)
        dealt[rank] += mine[owner]
        tokens[rank] += size[owner]
    found = []
    for share in _shares(rows_multiple):
        bundles = []
        for indices in dealt:
            mine_loads = [loads[index] for index in indices]
            largest = max((load.shared + load.own for load in mine_loads), default=0)
            most = budget if rows_multiple == 1 else min(budget, max(largest, -(-_tokens(mine_loads) // share)))
            named = [
                _Bundle([indices[item] for item in bundle.items], bundle.tokens, bundle.area)
                for bundle in _bundles(mine_loads, most)
            ]
            bundles.append(_sorted(named))
        fullest = max(sum(bundle.tokens for bundle in one) for one in bundles)
        num_rows = _round_up(max(1, math.ceil(fullest / budget)), rows_multiple)
        while None in (rows := [_fill(one, num_rows, budget) for one in bundles]):
            num_rows += rows_multiple
        rows, lengths = zip(*(_tightened(one, filled, multiple_of) for one, filled in zip(bundles, rows)))
        length = max(lengths)
        found.append((num_rows * length, share, length, bundles, rows))
    _, _, length, bundles, rows = min(found, key=lambda one: one[:2])
    even = [_balanced(one, len(filled), min(length, budget)) or filled for one, filled in zip(bundles, rows)]
    ranks = tuple(tuple(tuple(row.items) for row in _deal(filled, 1)[0]) for filled in even)
    return Plan(ranks, length, tokens=sum(bundle.tokens for one in bundles for bundle in one))


def _shares(rows_multiple: int) -> list[int]:
    """Into how many shares of its tokens a rank's groups may be cut."""
    return [1] if rows_multiple == 1 else [rows_multiple * 2**power for power in range(4)]


def _sorted(bundles: list[_Bundle]) -> list[_Bundle]:
    """The longest first."""
    return sorted(bundles, key=lambda bundle: (-bundle.tokens, bundle.items))


def _tokens(loads: Sequence[Load]) -> int:
    """Of all items, the prompt of a group once."""
    return sum(load.own for load in loads) + sum({load.group: load.shared for load in loads}.values())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _bundles(loads: list[Load], budget: int) -> list[_Bundle]:
    """Items of a group together, cut where they exceed the budget."""
    groups: dict[str, list[int]] = {}
    for index, load in enumerate(loads):
        groups.setdefault(load.group, []).append(index)
    bundles = []
    for members in groups.values():
        shared, shared_area = loads[members[0]].shared, loads[members[0]].shared_area
        bundle = _Bundle([], shared, shared_area)
        for index in members:
            if bundle.items and bundle.tokens + loads[index].own > budget:
                bundles.append(bundle)
                bundle = _Bundle([], shared, shared_area)
            bundle.items.append(index)
            bundle.tokens += loads[index].own
            bundle.area += loads[index].own_area
        bundles.append(bundle)
    return bundles


def _fill(bundles: list[_Bundle], num_rows: int, budget: int) -> list[_Bundle] | None:
    """Longest bundle first into the emptiest row; where one fits no row, all into the fullest row that can take it, as
    rows that are filled one by one hold more. None when a bundle fits no row then, either.
    """
    rows = [_Bundle([], 0) for _ in range(num_rows)]
    for bundle in bundles:
        row = min(rows, key=lambda row: row.tokens)
        if row.tokens + bundle.tokens > budget:
            return _filled_one_by_one(bundles, num_rows, budget)
        _add(row, bundle)
    return rows


def _filled_one_by_one(bundles: list[_Bundle], num_rows: int, length: int) -> list[_Bundle] | None:
    """Longest bundle first into the fullest row that can take it; None when one fits no row."""
    rows = [_Bundle([], 0) for _ in range(num_rows)]
    for bundle in bundles:
        fitting = [row for row in rows if row.tokens + bundle.tokens <= length]
        if not fitting:
            return None
        _add(max(fitting, key=lambda row: row.tokens), bundle)
    return rows


def _tightened(bundles: list[_Bundle], rows: list[_Bundle], multiple_of: int) -> tuple[list[_Bundle], int]:
    """As many rows, one or more multiples shorter if they can be filled one by one; and their length."""
    length = _round_up(max(row.tokens for row in rows), multiple_of) or multiple_of
    total = sum(bundle.tokens for bundle in bundles)
    while length > multiple_of and total <= len(rows) * (length - multiple_of):
        tighter = _filled_one_by_one(bundles, len(rows), length - multiple_of)
        if tighter is None:
            break
        rows, length = tighter, length - multiple_of
    return rows, length


def _balanced(bundles: list[_Bundle], num_rows: int, length: int) -> list[_Bundle] | None:
    """Rows of at most `length` tokens, bundles with most attention first, each into the row with least of it that has
    room; None when a bundle finds none.
    """
    rows = [_Bundle([], 0) for _ in range(num_rows)]
    for bundle in sorted(bundles, key=lambda bundle: (-bundle.area, -bundle.tokens, bundle.items)):
        fitting = [row for row in rows if row.tokens + bundle.tokens <= length]
        if not fitting:
            return None
        _add(min(fitting, key=lambda row: (row.area, row.tokens)), bundle)
    return rows


def _deal(rows: list[_Bundle], num_ranks: int) -> list[list[_Bundle]]:
    """As many rows for every rank, those with most attention first, each to the rank with least of it. So rows that are
    worked on at the same time are alike.
    """
    ranks: list[list[_Bundle]] = [[] for _ in range(num_ranks)]
    for row in sorted(rows, key=lambda row: (-row.area, -row.tokens)):
        waiting = [mine for mine in ranks if len(mine) < len(rows) // num_ranks]
        min(waiting, key=lambda mine: sum(one.area for one in mine)).append(row)
    return ranks


def _add(row: _Bundle, bundle: _Bundle) -> None:
    row.items += bundle.items
    row.tokens += bundle.tokens
    row.area += bundle.area
