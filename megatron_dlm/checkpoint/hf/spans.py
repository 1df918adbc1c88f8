"""Which rows of HuggingFace tensors the rows of a stored tensor are.

A distributed checkpoint keeps each tensor whole, under a key and, for tensors of layers and experts, at an index
(`Stored`). megatron-core packs what HuggingFace keeps apart (query, key and value; gate and up), always along the first
axis; so a recipe is a list of row spans, and everything else (shards of tensor parallelism, import, export, memory
bounds) follows from spans by slicing.

Invariant (tests/checkpoint/hf/test_spans.py): the spans of a whole model hold every row of every HuggingFace tensor
exactly once, and every row of every stored tensor at most once (rows that pad the vocabulary have no source).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron_dlm.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the whole model.

    Attributes:
        key: its name without indices, such as decoder.layers.mlp.linear_fc1.weight.
        layer, expert: its indices, None where it has none.
        shape: without the axes of layers and experts.
    """

    key: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """`count` rows from row `start` of a stored tensor are those from row `source` of the HuggingFace tensor `name`."""

    name: str
    source: int
    start: int
    count: int


class Recipe(Protocol):
    """How one stored tensor is made; names hold {layer} and {expert}."""

    def spans(self, stored: Stored, model: ModelConfig) -> list[Span]: ...


def _name(template: str, stored: Stored) -> str:
    return template.format(layer=stored.layer, expert=stored.expert)


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor, row for row."""

    name: str

    def spans(self, stored: Stored, model: ModelConfig) -> list[Span]:
        return [Span(_name(self.name, stored), 0, 0, stored.shape[0])]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One row per token; ours has rows of padding behind."""

    name: str

    def spans(self, stored: Stored, model: ModelConfig) -> list[Span]:
        return [Span(_name(self.name, stored), 0, 0, model.vocab_size)]


@dataclass(frozen=True, slots=True)
class Gated:
    """Two tensors of equal height, the gate first."""

    gate: str
    up: str

    def spans(self, stored: Stored, model: ModelConfig) -> list[Span]:
        half = stored.shape[0] // 2
        return [Span(_name(self.gate, stored), 0, 0, half), Span(_name(self.up, stored), 0, half, half)]


@dataclass(frozen=True, slots=True)
class Heads:
    """Query, key and value. Ours stand by group: the queries that share a key, that key, its value."""

    query: str
    key: str
    value: str

    def spans(self, stored: Stored, model: ModelConfig) -> list[Span]:
        names = [_name(template, stored) for template in (self.query, self.key, self.value)]
        return _by_group(model, names, (0, 0, 0))


@dataclass(frozen=True, slots=True)
class FusedHeads:
    """One tensor of all queries, then all keys, then all values."""

    name: str

    def spans(self, stored: Stored, model: ModelConfig) -> list[Span]:
        queries, keys = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
        return _by_group(model, [_name(self.name, stored)] * 3, (0, queries, queries + keys))


def _by_group(model: ModelConfig, names: list[str], first: tuple[int, int, int]) -> list[Span]:
    """Args: names: of query, key, value. first: row at which each begins in its tensor."""
    groups, width = model.num_query_groups, model.kv_channels
    counts = (model.num_attention_heads // groups * width, width, width)
    spans, start = [], 0
    for group in range(groups):
        for name, begin, count in zip(names, first, counts):
            spans.append(Span(name, begin + group * count, start, count))
            start += count
    return spans


def within(spans: list[Span], start: int, count: int) -> list[Span]:
    """The part of the spans that lies in rows [start, start + count) of the stored tensor, counted from `start`."""
    cut = []
    for span in spans:
        low, high = max(span.start, start), min(span.start + span.count, start + count)
        if low < high:
            cut.append(Span(span.name, span.source + low - span.start, low - start, high - low))
    return cut


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [source, source + count) of a HuggingFace tensor lie in `stored` from row `start`."""

    stored: Stored
    source: int
    start: int
    count: int


def tensors_of(
    table: Mapping[str, Recipe], stored: list[Stored], model: ModelConfig
) -> dict[str, tuple[tuple[int, ...], list[Piece]]]:
    """The HuggingFace tensors of a whole model, in the order of its stored tensors: name -> (shape, pieces by row)."""
    pieces: dict[str, list[Piece]] = {}
    for one in stored:
        for span in table[one.key].spans(one, model):
            pieces.setdefault(span.name, []).append(Piece(one, span.source, span.start, span.count))
    found = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda piece: piece.source)
        found[name] = ((parts[-1].source + parts[-1].count, *parts[0].stored.shape[1:]), parts)
    return found
