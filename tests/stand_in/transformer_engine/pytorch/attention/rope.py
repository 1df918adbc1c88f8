"""Rotary positions, turned by rows of angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

calls: list[tuple[int, ...]] = []
"""Shapes that the fused kernel was asked for."""


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, tensor_format: str = "sbhd", interleaved: bool = False, fused: bool = False, **_: Any
) -> Tensor:
    """`t` [s, b, h, d], `freqs` [s2, 1, 1, d2] with s2 >= s and d2 <= d, in float32."""
    if tensor_format != "sbhd" or interleaved or not fused:
        raise ValueError("a way of calling it that this stand-in knows nothing of")
    if len(freqs) < len(t) or freqs.shape[-1] > t.shape[-1] or freqs.dtype != torch.float32:
        raise ValueError("angles that the kernel does not take")
    calls.append(tuple(t.shape))
    angles = freqs[: len(t)]
    turned, kept = t[..., : angles.shape[-1]], t[..., angles.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    rotated = turned * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([rotated.to(t.dtype), kept], dim=-1)
