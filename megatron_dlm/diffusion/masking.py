"""How much of a clean text is hidden when a model is trained on it.

A mask ratio t is drawn per block (or per sample, or per token), then every token of the response is hidden with
probability t and carries the weight 1/t of the evidence bound (MDLM, arXiv 2406.07524; BD3-LM, arXiv 2503.09573),
clipped at a stated maximum because 1/t has no finite variance near 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
        at_least_one: hide a token of each block in which none would be, that which came nearest to it.
    """

    per: str = "block"
    min_ratio: float = 1e-3
    max_weight: float = 10.0
    max_ratio: float = 1.0
    at_least_one: bool = False

    def __post_init__(self) -> None:
        if self.per not in ("block", "sample", "token"):
            raise ValueError(f"mask ratios are drawn per 'block', 'sample' or 'token', not per {self.per!r}")

    def draw(
        self, stream: int, position: Tensor, block: Tensor, number: int = 0, learned: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mask and weights for the tokens of one response.

        Args:
            stream: keys.stream(...) of this sample at this training step.
            position, block: int64 [R], absolute position and block index of each response token.
            number: of the mask, where several are drawn of one stream.
            learned: bool [R], the tokens that count for `at_least_one`; None for all.

        Returns:
            masked: bool [R].
            weight: float64 [R], min(1/t, max_weight) of the ratio that each token was drawn with.
        """
        masked, ratio = self._draw(stream, position, block, number, learned)
        return masked, self._weight(ratio)

    def pair(
        self, stream: int, position: Tensor, block: Tensor, number: int = 0, learned: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A mask and its complement, which is one of ratio 1 - t: together they hide each token once. As `draw`."""
        masked, ratio = self._draw(stream, position, block, number, learned)
        return (masked, self._weight(ratio)), (~masked, self._weight(1 - ratio))

    def _weight(self, ratio: Tensor) -> Tensor:
        return (1 / ratio).clamp(max=self.max_weight)

    def _draw(
        self, stream: int, position: Tensor, block: Tensor, number: int, learned: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        unit = {"block": block, "sample": torch.zeros_like(block), "token": position}[self.per]
        # Two kinds of draws in one stream: the last counter tells them apart.
        counter = torch.full_like(position, 2 * number)
        ratio = self.min_ratio + (self.max_ratio - self.min_ratio) * uniforms(stream, unit, counter)
        lot = uniforms(stream, position, counter + 1)
        masked = lot < ratio
        if self.at_least_one and len(lot):
            learned = torch.ones_like(masked) if learned is None else learned
            masked = masked | _nearest(lot / ratio, block, learned, masked)
        return masked, ratio


def _nearest(lot: Tensor, block: Tensor, learned: Tensor, masked: Tensor) -> Tensor:
    """bool [R], the learned token with the smallest lot in each block in which no learned one is masked."""
    _, unit = torch.unique(block, return_inverse=True)
    hidden = torch.zeros(int(unit.max()) + 1, dtype=torch.long).index_add(0, unit, (masked & learned).long())
    candidates = torch.nonzero(learned & (hidden[unit] == 0))[:, 0]
    order = candidates[torch.argsort(lot[candidates], stable=True)]
    _, first = np.unique(unit[order].numpy(), return_index=True)
    chosen = torch.zeros_like(masked)
    chosen[order[torch.from_numpy(first)]] = True
    return chosen
