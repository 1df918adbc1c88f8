"""How much of a clean text is hidden when a model is trained on it.

A mask ratio t is drawn per block (or per sample, or per token), then every token of the response is hidden with
probability t and carries the weight 1/t of the evidence bound (MDLM, arXiv 2406.07524; BD3-LM, arXiv 2503.09573),
clipped at a stated maximum because 1/t has no finite variance near 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.diffusion.keys import uniforms


@dataclass(frozen=True, slots=True)
class MaskSchedule:
    """Uniform mask ratios between `min_ratio` and `max_ratio`.

    Attributes:
        per: 'block' draws one ratio per block, 'sample' one for the whole response, 'token' one for each token.
        min_ratio, max_ratio: the smallest ratio, and the largest.
        max_weight: the weight 1/t is clipped here.
    """

    per: str = "block"
    min_ratio: float = 1e-3
    max_weight: float = 10.0
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.per not in ("block", "sample", "token"):
            raise ValueError(f"mask ratios are drawn per 'block', 'sample' or 'token', not per {self.per!r}")

    def draw(self, stream: int, position: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and weights for the tokens of one response.

        Args:
            stream: keys.stream(...) of this sample at this training step.
            position, block: int64 [R], absolute position and block index of each response token.

        Returns:
            masked: bool [R].
            weight: float64 [R], min(1/t, max_weight) of the ratio that each token was drawn with.
        """
        unit = {"block": block, "sample": torch.zeros_like(block), "token": position}[self.per]
        # Two kinds of draws in one stream: the last counter tells them apart.
        ratio = self.min_ratio + (self.max_ratio - self.min_ratio) * uniforms(stream, unit, torch.zeros_like(unit))
        masked = uniforms(stream, position, torch.ones_like(position)) < ratio
        return masked, (1 / ratio).clamp(max=self.max_weight)
