"""Which tiles of queries see which tiles of keys, from the layout alone.

A kernel that skips what nobody sees wants to know, for each pair of a tile of queries and a tile of keys, whether all
of its pairs are visible (full), some may be (partial), or none is (neither). A mask of every query and key would say
that, and would take as long to make as the attention that it saves. Here a few numbers of each piece of a row stand
for its tokens: the least and the largest group, text, view and block. Pieces are smaller than tiles, because a tile
where one text ends and another begins has ranges that say little.

Everything happens on the layout's device in a fixed number of operations, and nothing is read back by the host.

Invariants (tests/model/test_attention_flex.py):
  - of a full tile every pair is visible, of a tile that is neither none, so that full | partial & rule is the rule;
  - the tables of keys are those of queries transposed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_dlm.diffusion.layout import CLEAN, PADDING, PROMPT, Layout

PIECE = 32  # tokens that are summed up together
_LEAST, _MOST = -(2**62), 2**62  # below and above every number of a layout


@dataclass(frozen=True, slots=True)
class Tables:
    """Tiles as block-sparse kernels read them, all int32: how many tiles a line has, and which they are, ascending;
    what stands behind them in the line is no tile of it. N lines of tiles of queries, M of keys.

    Attributes:
        keys, key: [N] and [N, M], partial tiles of keys of a tile of queries. full_keys, full_key: full ones.
        queries, query: [M] and [M, N], partial tiles of queries of a tile of keys. full_queries, full_query: full ones.
    """

    keys: Tensor
    key: Tensor
    full_keys: Tensor
    full_key: Tensor
    queries: Tensor
    query: Tensor
    full_queries: Tensor
    full_query: Tensor

    @classmethod
    def of(cls, q: Layout, k: Layout, tile: int) -> Tables:
        """Of layouts whose lengths are multiples of `tile`."""
        some, full = classes(q, k, tile)
        partial = some & ~full
        return cls(*_listed(partial), *_listed(full), *_listed(partial.T), *_listed(full.T))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def classes(q: Layout, k: Layout, tile: int) -> tuple[Tensor, Tensor]:
    """Tiles in which some pair may be visible, and tiles in which all are, bool [N, M] each. The second are among the
    first.
    """
    piece = min(PIECE, tile)
    asking = _Pieces(q, piece)
    seen = asking if q is k else _Pieces(k, piece)
    per_tile = tile // piece
    tiles = (len(q.group) // tile, per_tile, len(k.group) // tile, per_tile)
    some = _some(asking, seen).view(tiles).any(3).any(1)
    full = _all(asking, seen).view(tiles).all(3).all(1)
    return some, full & some


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """bool [N, M] -> how many of a line are true, and which, these first; int32 [N] and [N, M]."""
    order = torch.argsort(tiles.to(torch.uint8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


@dataclass(frozen=True, slots=True)
class _Range:
    """Least and largest value in each piece, [pieces] each, of the tokens that count; of none, no number at all."""

    least: Tensor
    most: Tensor

    def meets(self, other: _Range) -> Tensor:
        """Whether ranges have values in common, bool [own pieces, other's pieces]."""
        return (self.least[:, None] <= other.most) & (other.least <= self.most[:, None])

    def equals(self, other: _Range) -> Tensor:
        """Whether all values of both are the same one."""
        same = self.least[:, None] == other.least
        return (self.least == self.most)[:, None] & same & (other.least == other.most)

    def equals_or_none(self, other: _Range) -> Tensor:
        """The same, and wherever the other has no values."""
        return self.equals(other) | (other.least > other.most)


class _Part:
    """Some of the tokens of each piece, summed up: ranges of `text`, `group`, `view` and `block` (see `_Pieces`)."""

    def __init__(self, columns: Tensor, counts: Tensor) -> None:
        least = torch.where(counts, columns, _MOST).amin(2)
        most = torch.where(counts, columns, _LEAST).amax(2)
        self.text, self.group, self.view, self.block = map(_Range, least, most)


class _Pieces:
    """The pieces of a layout, summed up.

    A token's `text` is its group and its response in one number, its `group` the number of the prompt of the group.

    Attributes:
        is_real, is_clean, is_prompt: bool [pieces, size]. only_real, only_clean: [pieces], whether all tokens are so.
        all, clean, noisy: of these tokens.
    """

    def __init__(self, layout: Layout, size: int) -> None:
        columns = (layout.group, layout.response, layout.view, layout.block)
        group, response, view, block = (column.view(-1, size).long() for column in columns)
        real, is_prompt, is_clean = group != PADDING, response == PROMPT, view == CLEAN
        group = group * 2**31
        self.columns = torch.stack([group + response - PROMPT, group, view, block])
        self.is_clean, self.is_prompt, self.is_real = is_clean, is_prompt, real
        self.all = self.part(real)
        self.clean, self.noisy = self.part(real & is_clean), self.part(real & ~is_clean)
        self.only_real, self.only_clean = real.all(1), is_clean.all(1)

    def part(self, counts: Tensor) -> _Part:
        return _Part(self.columns, counts)


def _some(q: _Pieces, k: _Pieces) -> Tensor:
    """Whether some pair of two pieces may be visible, bool [pieces of q, pieces of k]: the rule over ranges."""
    found = None
    for name, whose in (("group", k.is_real & k.is_prompt), ("text", k.is_real & ~k.is_prompt)):
        clean, noisy = k.part(whose & k.is_clean), k.part(whose & ~k.is_clean)
        asks = [getattr(part, name) for part in (q.clean, q.noisy)]
        seen = asks[0].meets(clean.text) & (clean.block.least <= q.clean.block.most[:, None])
        seen |= asks[1].meets(clean.text) & (clean.block.least < q.noisy.block.most[:, None])
        seen |= asks[1].meets(noisy.text) & q.noisy.view.meets(noisy.view) & q.noisy.block.meets(noisy.block)
        found = seen if found is None else found | seen
    return found


def _all(q: _Pieces, k: _Pieces) -> Tensor:
    """Whether all pairs of two pieces are visible."""
    prompt, own = k.part(k.is_prompt), k.part(~k.is_prompt)
    text = q.all.group.equals_or_none(prompt.text) & q.all.text.equals_or_none(own.text)
    before = k.only_clean & (k.all.block.most < q.all.block.least[:, None])
    clean = q.only_clean[:, None] & k.only_clean & (k.all.block.most <= q.all.block.least[:, None])
    within = q.all.view.equals(k.all.view) & q.all.block.equals(k.all.block)
    return q.only_real[:, None] & k.only_real & text & (before | clean | within)
