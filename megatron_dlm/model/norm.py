"""RMSNorm that works with sequence parallelism and without Transformer Engine or Apex.

megatron-core's fallback norm refuses sequence parallelism because nobody would reduce its weight's gradient over the tensor-parallel group.
Marking the weight with `sequence_parallel` is what megatron-core's gradient finalisation looks for.
"""
from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), reduced in fp32 or better.

    Args:
        config: read for its parameter dtype and for sequence parallelism.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight
