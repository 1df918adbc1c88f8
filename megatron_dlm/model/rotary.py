"""Rotary frequencies by position, one row per token.

megatron-core computes them by sequence index. In our rows a noisy copy keeps the position of the token that it copies,
so the frequencies are computed from the positions that travel in `RowParams`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_dlm.model.row_params import RowParams


class RotaryByPosition(nn.Module):
    """Stands where GPTModel keeps its `rotary_pos_emb`, with the same two calls.

    Args:
        head_dim: rotary dimensions of a head; megatron-core leaves the channels after them as they are.
        base: theta (RoFormer, arXiv 2104.09864).
        dtype: of the angles: float64 in models of float64, which devices then compute alike; float32 in all others.
    """

    def __init__(self, head_dim: int, base: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self.dtype = dtype

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, transformer_config, packed_seq_params: RowParams
    ) -> Tensor:
        """What `forward` needs to know of the row: its positions [T] (GPTModel passes this value on untouched)."""
        return packed_seq_params.position

    def forward(self, position: Tensor, **_: object) -> Tensor:
        """Angles [T, 1, 1, head_dim], the two halves alike (Qwen's and megatron-core's rotate-half)."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=self.dtype, device=position.device) / self.head_dim
        angles = position.to(self.dtype)[:, None] / self.base**exponent
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]
