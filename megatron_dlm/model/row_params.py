"""What travels with a row through megatron-core's layers.

The carrier is `PackedSeqParams`, because megatron-core hands it to every attention layer unchanged, under pipeline
stages and under activation recomputation too (an `attention_mask` would be saved for backward by the latter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Attention(Protocol):
    """Turns queries, keys and values of one layer into the attention output; knows who sees whom.

    Args:
        layer: 1-based index of the layer.
        q: [T, 1, heads, d].
        k, v: [T, 1, kv heads, d].
        scale: of the scores.

    Returns: [T, 1, heads * d].
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


@dataclass
class RowParams(PackedSeqParams):
    """A row, as the layers see it. Tensors stay in 'sbhd' form, [T, 1, heads, d].

    Attributes:
        position: int [T], RoPE positions.
        slots: int64 [N], where the head is evaluated.
        headless: the last stage returns hidden states at the slots instead.
        attention: who sees whom.
    """

    qkv_format: str = "sbhd"
    position: Tensor = None
    slots: Tensor = None
    attention: Attention = None
    headless: bool = False
