"""Attention from the layout.

`LayoutAttention` is the core attention that the layer specs name; it owns no rule of its own and asks the row's
`Attention`. `DenseAttention` is that for a packed row: exact on every device, the oracle of every other backend.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.diffusion.layout import Layout, visible
from megatron_dlm.model.buckets import by_length
from megatron_dlm.model.row_params import RowParams

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

    Groups never see each other, and `build_row` writes each in one run of slots; so the row is cut into its groups, and
    groups of similar length are padded to one shape and attended to in one call. The work is about the sum of squares
    of the groups' lengths, and a [T, T] mask is never made. Padding slots get zeros.
    """

    def __init__(self, layout: Layout) -> None:
        real = torch.nonzero(layout.group >= 0)[:, 0]
        lengths = torch.unique_consecutive(layout.group[real], return_counts=True)[1]
        first = lengths.cumsum(0) - lengths
        self.masks: list[Tensor] = []  # of each bucket, bool [G, 1, L, L]
        slots, inside = [], []
        counts = lengths.tolist()
        for members in by_length(counts, floor=_SHORT):
            member = torch.tensor(members, device=real.device)
            offset = torch.arange(counts[members[0]], device=real.device)
            inside.append(offset < lengths[member, None])  # [G, L]
            slots.append(real[(first[member, None] + offset).clamp(max=len(real) - 1)])
            self.masks.append(_group_masks(layout, slots[-1], inside[-1]))
        # The padded groups of all buckets, one after the other, are a table of `size` lines.
        self.size = sum(table.numel() for table in inside)
        is_real = torch.cat([table.flatten() for table in inside]) if inside else real
        self.line = torch.nonzero(is_real)[:, 0]  # lines that hold a token,
        self.slot = torch.cat([table.flatten() for table in slots])[self.line] if slots else real  # and its slot

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, dim = q.shape
        if not self.masks:  # a gradient of zeros for all: gradients that are reduced as they come are waited for
            return (q * 0 + (k * 0).sum() + (v * 0).sum()).reshape(tokens, 1, heads * dim)
        buckets = zip(self.masks, *(self._per_bucket(x) for x in (q, k, v)))
        parts = [masked_attention(*qkv, mask, scale).flatten(0, 1) for mask, *qkv in buckets]
        out = torch.cat(parts) if len(parts) > 1 else parts[0]  # [size, heads * d]
        return _Move.apply(out, self.line, self.slot, tokens)[:, None]

    def _per_bucket(self, x: Tensor) -> list[Tensor]:
        """[T, 1, heads, d] -> a [G, heads, L, d] per bucket, zeros where a group is shorter than L."""
        _, _, heads, dim = x.shape
        table = _Move.apply(x.reshape(-1, heads * dim), self.slot, self.line, self.size)
        shapes = [(len(mask), mask.shape[-1]) for mask in self.masks]
        parts = table.split([groups * length for groups, length in shapes])
        return [part.view(*shape, heads, dim).transpose(1, 2) for part, shape in zip(parts, shapes)]


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


def _group_masks(layout: Layout, slots: Tensor, inside: Tensor) -> Tensor:
    """Who sees whom in each of G groups, bool [G, 1, L, L].

    Args:
        slots: int64 [G, L], where the groups stand in the row.
        inside: bool [G, L]; what stands outside its group sees itself, so that its softmax is finite.
    """

    def seen(*columns: Tensor) -> Tensor:
        group = Layout(*columns)
        return visible(group, group)

    columns = (layout.group, layout.response, layout.view, layout.block, layout.position)
    masks = torch.vmap(seen)(*(column[slots] for column in columns))
    return (masks & inside[:, None] | torch.diag_embed(~inside))[:, None]


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
