"""What attention keeps for the backward pass, without masks to compute it from.

The attention of a real row is made from the row's layout, whose numbers a plan does not have. `PlannedAttention` has
its interface and keeps as many bytes: queries, keys, values, output and one number per query and head. The dense
attention pads groups to the longest of their bucket, repeats shared keys and values for all heads on a GPU, and keeps
a mask in the type of the scores; each of them is here too.

It computes something (so that gradients flow), but not attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.model.attention import _SHORT
from megatron_dlm.model.buckets import by_length


@dataclass(frozen=True, slots=True)
class Kept:
    """How an attention backend treats a row.

    Attributes:
        lengths: tokens of the row's groups, for the dense backend; None for one that takes the row as it is.
        repeats: whether keys and values are repeated for all heads that share them.
        gathered: tokens of other context-parallel ranks whose keys and values are gathered.
    """

    lengths: tuple[int, ...] | None = None
    repeats: bool = False
    gathered: int = 0


def group_lengths(tokens: int, typical: int) -> tuple[int, ...]:
    """The groups of a row that is filled with groups of a typical length."""
    typical = max(1, min(typical, tokens))
    return (typical,) * (tokens // typical) + ((tokens % typical,) if tokens % typical else ())


class PlannedAttention:
    """The attention of a planned row of T tokens (model/row_params.py)."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.buckets = [] if kept.lengths is None else _buckets(kept.lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.kept.gathered:
            k, v = (torch.cat([x, x.new_empty(self.kept.gathered, *x.shape[1:])]) for x in (k, v))
        return _Attend.apply(q, k, v, self.buckets if self.kept.lengths is not None else None, self.kept.repeats)


def _buckets(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(groups, padded length) of each call that the dense attention makes."""
    return [(len(members), lengths[members[0]]) for members in by_length(list(lengths), floor=_SHORT)]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, buckets: list | None, repeats: bool) -> Tensor:
        tokens, _, heads, dim = q.shape
        lines = tokens if buckets is None else sum(count * length for count, length in buckets)
        kept_heads = heads if repeats else k.shape[2]
        if buckets is None:
            out = q.new_empty(tokens, heads * dim)
            kept = [q, k, v, out]
            result = out[:, None]
        else:
            kept = [q.new_empty(lines, heads, dim), *(k.new_empty(lines, kept_heads, dim) for _ in range(2))]
            kept.append(q.new_empty(lines, heads, dim))  # the output in its padded table
            kept += [q.new_empty(count, 1, length, length) for count, length in buckets]
            result = q.new_empty(tokens, 1, heads * dim)
        kept.append(torch.empty(heads, lines, dtype=torch.float32, device=q.device))
        ctx.save_for_backward(*kept)
        ctx.shapes = q.shape, k.shape, v.shape
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        del kept
        return (*(grad.new_empty(shape) for shape in ctx.shapes), None, None)
