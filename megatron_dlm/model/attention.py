"""Attention from the layout.

`LayoutAttention` is the core attention that the layer specs name; it owns no rule of its own and asks the row's
`Attention`. `DenseAttention` is that for a packed row: exact on every device, the oracle of every other backend
(attention_backends.py). `ContextAttention` is that for a part of a row, under context parallelism, by any backend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.diffusion.layout import CLEAN, Layout, visible
from megatron_dlm.diffusion.rows import Context
from megatron_dlm.model.buckets import by_length
from megatron_dlm.model.row_params import Attention, RowParams

_SHORT = 48  # tokens; groups up to here share a bucket


class LayoutAttention(MegatronModule):
    """megatron-core's `core_attention` slot: passes q, k, v on to the row's attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        self.layer = layer_number
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: RowParams,
        **_: object,
    ) -> Tensor:
        return packed_seq_params.attention(self.layer, query, key, value, self.scale)


class DenseAttention:
    """Scaled dot-product attention under dense masks, one per group.

    Groups never see each other; so a row is cut into its groups, and groups of similar length are padded to one shape
    and attended to in one call. The work is about the sum of squares of the groups' lengths, and a [T, T] mask is never
    made. Padding slots get zeros.

    Args:
        layout: of the queries [T].
        keys: layout of the keys [K]; None where they are those of the same tokens.
    """

    def __init__(self, layout: Layout, keys: Layout | None = None) -> None:
        asking = _Groups(layout)
        seen = asking if keys is None else _Groups(keys, asking.names)
        buckets = by_length(seen.counts, floor=_SHORT)
        self.queries = _Table(asking, buckets)
        self.keys = self.queries if keys is None else _Table(seen, buckets)
        tables = zip(self.queries.slots, self.queries.inside, self.keys.slots, self.keys.inside)
        self.masks = [_group_masks(layout, layout if keys is None else keys, *table) for table in tables]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, dim = q.shape
        if not self.masks:  # a gradient of zeros for all: gradients that are reduced as they come are waited for
            return (q * 0 + (k * 0).sum() + (v * 0).sum()).reshape(tokens, 1, heads * dim)
        buckets = zip(self.masks, self.queries.split(q), self.keys.split(k), self.keys.split(v))
        parts = [masked_attention(*qkv, mask, scale).flatten(0, 1) for mask, *qkv in buckets]
        out = torch.cat(parts) if len(parts) > 1 else parts[0]  # [lines, heads * d]
        return self.queries.back(out, tokens)[:, None]


class ContextAttention:
    """Attention of one part of a row, whose other parts are on the other ranks of a group.

    Each rank sends the keys and values of its clean text, [C, 2 kv heads d] with C the most that a rank has, and
    nothing else; the backward pass sums their gradients where they came from.

    Args:
        kind: makes the attention of these queries to these keys from the layouts of both.
    """

    def __init__(
        self,
        layout: Layout,
        context: Context,
        group: dist.ProcessGroup,
        kind: Callable[[Layout, Layout], Attention] = DenseAttention,
    ) -> None:
        self.context, self.group = context, group
        noisy = (layout.view != CLEAN) & (layout.group >= 0)
        self.own = torch.nonzero(noisy)[:, 0]
        columns = (field.name for field in dataclasses.fields(Layout))
        keys = (torch.cat([getattr(context.clean, name), getattr(layout, name)[self.own]]) for name in columns)
        self.inner = kind(layout, Layout(*keys))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.context.width:  # of this row some rank has clean text
            clean = self._clean_of_all(*(x.index_select(0, self.context.slot) for x in (k, v)))
        else:
            clean = k[:0], v[:0]
        k, v = (torch.cat([text, x.index_select(0, self.own)]) for text, x in zip(clean, (k, v)))
        return self.inner(layer, q, k, v, scale)

    def _clean_of_all(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """This rank's clean keys and values, [n, 1, kv heads, d] -> those of all ranks, [ranks * C, ...]."""
        mine = torch.cat([k, v], dim=-1)
        missing = mine.new_zeros(self.context.width - len(mine), *mine.shape[1:])
        return gather_from_sequence_parallel_region(torch.cat([mine, missing]), group=self.group).chunk(2, dim=-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scaled dot-product attention of n sequences, each key-value head serving a group of query heads.

    Args:
        q: [n, heads, Q, d].
        k, v: [n, kv heads, K, d].
        mask: bool [n, 1, Q, K].

    Returns: [n, Q, heads * d].
    """
    sharing = q.shape[1] // k.shape[1]
    if sharing > 1 and platform.is_cuda():
        # By torch's documentation its fast CUDA kernels take a mask or shared heads, not both. The choice of kernel has
        # not been measured.
        k, v = k.repeat_interleave(sharing, dim=1), v.repeat_interleave(sharing, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


class _Groups:
    """Where the groups of a row stand in it.

    Args:
        names: of the groups that matter, ascending; None for all.

    Attributes:
        slots: int64 [n], of the tokens of these groups, group after group. first: int64 [G], where each begins in
            `slots`. counts: how many each has.
    """

    def __init__(self, layout: Layout, names: Tensor | None = None) -> None:
        real = torch.nonzero(layout.group >= 0)[:, 0]
        group = layout.group[real]
        self.names = group.unique() if names is None else names
        kept = torch.isin(group, self.names)
        group, order = group[kept].sort(stable=True)
        self.slots = real[kept][order]
        lengths = torch.bincount(torch.searchsorted(self.names, group), minlength=len(self.names))
        self.first, self.counts = lengths.cumsum(0) - lengths, lengths.tolist()


class _Table:
    """Tokens of a row, padded group by group: the buckets' groups one after the other are a table of `size` lines.

    Args:
        buckets: of indices of groups.

    Attributes:
        slots, inside: of each bucket int64 and bool [G, L], where its tokens stand in the row, and where there is one.
    """

    def __init__(self, groups: _Groups, buckets: list[list[int]]) -> None:
        device = groups.slots.device
        self.slots: list[Tensor] = []
        self.inside: list[Tensor] = []
        for members in buckets:
            counts = torch.tensor([groups.counts[member] for member in members], device=device)
            offset = torch.arange(max(groups.counts[member] for member in members), device=device)
            self.inside.append(offset < counts[:, None])
            at = groups.first[torch.tensor(members, device=device)][:, None] + offset
            self.slots.append(groups.slots[at.clamp(max=len(groups.slots) - 1)])
        self.size = sum(table.numel() for table in self.inside)
        is_real = torch.cat([table.flatten() for table in self.inside]) if buckets else groups.slots
        self.line = torch.nonzero(is_real)[:, 0]  # lines that hold a token,
        self.slot = (
            torch.cat([table.flatten() for table in self.slots])[self.line] if buckets else self.line
        )  # its slot

    def split(self, x: Tensor) -> list[Tensor]:
        """[T, 1, heads, d] -> a [G, heads, L, d] per bucket, zeros where a group is shorter than L."""
        _, _, heads, dim = x.shape
        table = _Move.apply(x.reshape(-1, heads * dim), self.slot, self.line, self.size)
        parts = table.split([inside.numel() for inside in self.inside])
        shapes = [inside.shape for inside in self.inside]
        return [part.view(*shape, heads, dim).transpose(1, 2) for part, shape in zip(parts, shapes)]

    def back(self, lines: Tensor, tokens: int) -> Tensor:
        """[size, width] -> [T, width], zeros where no line is of a token."""
        return _Move.apply(lines, self.line, self.slot, tokens)


def _group_masks(queries: Layout, keys: Layout, asking: Tensor, asks: Tensor, seen: Tensor, exists: Tensor) -> Tensor:
    """Who sees whom in each of G groups, bool [G, 1, Q, K].

    Args:
        asking, seen: int64 [G, Q] and [G, K], where the groups' queries and keys stand in their rows.
        asks, exists: bool, where there is one. What is no query sees everything, so that its softmax is finite.
    """

    def rule(q: list[Tensor], k: list[Tensor]) -> Tensor:
        return visible(Layout(*q), Layout(*k))

    columns = ("group", "response", "view", "block", "position")
    gathered = [[getattr(one, name)[slots] for name in columns] for one, slots in ((queries, asking), (keys, seen))]
    masks = torch.vmap(rule)(*gathered)
    return (masks & exists[:, None] | ~asks[:, :, None])[:, None]


class _Move(torch.autograd.Function):
    """Lines `source` of x [n, width] to lines `destination` of a tensor of `size` lines, zeros elsewhere.

    Each line moves once, and backward is the same move the other way. Autograd's own scatter would add line by line,
    many times slower on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, destination: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(source, destination)
        ctx.lines = len(x)
        return x.new_zeros(size, x.shape[1]).index_copy_(0, destination, x.index_select(0, source))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source, destination = ctx.saved_tensors
        return (
            grad.new_zeros(ctx.lines, grad.shape[1]).index_copy_(0, source, grad.index_select(0, destination)),
            None,
            None,
            None,
        )
