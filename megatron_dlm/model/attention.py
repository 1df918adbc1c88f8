"""Attention from the layout.

`LayoutAttention` is the core attention that the layer specs name; it owns no rule of its own and asks the row's `Attention`. `DenseAttention` is
that for a packed row: exact on every device, the oracle of every other backend.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dlm.diffusion.layout import Layout, visible
from megatron_dlm.model.row_params import RowParams


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

    Groups never see each other, and `build_row` writes each in one run of slots; so the row is cut into its groups, padded to the longest, and
    a [T, T] mask is never made. Padding slots get zeros.
    """

    def __init__(self, layout: Layout) -> None:
        real = torch.nonzero(layout.group >= 0)[:, 0]
        groups, lengths = torch.unique_consecutive(layout.group[real], return_counts=True)
        longest = int(lengths.max()) if len(lengths) else 0
        offset = torch.arange(longest, device=real.device)
        self.inside = offset < lengths[:, None]  # [G, L]
        first = lengths.cumsum(0) - lengths
        slot = (first[:, None] + offset).clamp(max=max(len(real) - 1, 0))
        self.slot = real[slot] if len(real) else slot  # [G, L]
        self.real, self.place = (
            real,
            torch.nonzero(self.inside.flatten())[:, 0],
        )  # slots of real tokens, and where they stand in [G * L]
        self.mask = (
            torch.stack([self._mask(layout, slots, inside) for slots, inside in zip(self.slot, self.inside)])
            if len(groups)
            else None
        )

    @staticmethod
    def _mask(layout: Layout, slots: Tensor, inside: Tensor) -> Tensor:
        """bool [1, L, L]; what stands outside the group sees itself, so that its softmax is finite."""
        part = Layout(
            layout.group[slots], layout.response[slots], layout.view[slots], layout.block[slots], layout.position[slots]
        )
        return (visible(part, part) & inside | torch.diag(~inside))[None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, dim = q.shape
        if self.mask is None:
            return (q * 0).reshape(tokens, 1, heads * dim)
        q, k, v = (self._per_group(x) for x in (q, k, v))  # [G, heads, L, d]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return _Move.apply(out.transpose(1, 2).reshape(-1, heads * dim), self.place, self.real, tokens)[:, None]

    def _per_group(self, x: Tensor) -> Tensor:
        """[T, 1, heads, d] -> [G, heads, L, d], zeros where a group is shorter than L."""
        _, _, heads, dim = x.shape
        groups, longest = self.inside.shape
        return (
            _Move.apply(x.reshape(-1, heads * dim), self.real, self.place, groups * longest)
            .view(groups, longest, heads, dim)
            .transpose(1, 2)
        )


class _Move(torch.autograd.Function):
    """Lines `source` of x [n, width] to lines `destination` of a tensor of `size` lines, zeros elsewhere; each line moves once.

    Backward is the same move the other way. Autograd's own scatter would add line by line, many times slower on a CPU.
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
