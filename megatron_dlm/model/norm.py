"""RMSNorm that works with sequence parallelism and without Transformer Engine or Apex.

megatron-core's fallback norm refuses sequence parallelism because nobody would reduce its weight's gradient over the
tensor-parallel group. Marking the weight with `sequence_parallel` is what megatron-core's gradient finalisation looks
for.
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
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight, with the backward written out.

    It takes half the passes over memory of what autograd would do, and keeps x and one number per line only.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.to(inverse.dtype) * inverse
        through = grad.to(inverse.dtype)
        weight_grad = torch.linalg.vecdot(through.reshape(-1, x.shape[-1]), normed.reshape(-1, x.shape[-1]), dim=0)
        through = through * weight
        along = torch.linalg.vecdot(through, normed, dim=-1)[..., None] / x.shape[-1]
        return through.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), weight_grad.to(weight.dtype), None
