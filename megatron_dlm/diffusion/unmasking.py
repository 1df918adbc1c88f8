"""Which of the sampled tokens are kept at a denoising step.

All requests of a batch are decided together, each under its own policy. What a policy may do is fixed here:
  - it chooses among masked positions only: a known token, the prompt's tail included, is never touched;
  - it takes at least one position while any is masked, and all that remain at the last denoising step: no block is
    committed with a mask in it;
  - equal confidences are settled by the lowest index.

Source: TraceRL, arXiv 2509.06949, section 5.1.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Remasking(IntEnum):
    """The unmasking policies, by the names of their flags."""

    STATIC = 0  # the n most confident positions, n from the schedule
    DYNAMIC = 1  # every position above the threshold, or the n most confident if those are fewer than n
    SEQUENTIAL = 2  # the n first masked positions


def scheduled_count(block_size: Tensor, denoising_steps: Tensor, step: Tensor) -> Tensor:
    """How many tokens a block unmasks at its `step`-th denoising step (0-based): B/S, the remainder spread over the
    first steps.

    Args: integer tensors of one shape [S], one entry per request. Returns the same shape.
    """
    return block_size // denoising_steps + (step < block_size % denoising_steps).to(block_size.dtype)


def select(
    remasking: Tensor, confidence: Tensor, masked: Tensor, count: Tensor, threshold: Tensor, last_step: Tensor
) -> Tensor:
    """Positions to unmask now.

    Args:
        remasking: int [S], a `Remasking` per request.
        confidence: float [S, B] of the token sampled at each position; read only where masked.
        masked: bool [S, B].
        count: int [S], the scheduled number of tokens (`scheduled_count`).
        threshold: float [S], used by DYNAMIC: a strict bound.
        last_step: bool [S], True at the request's last denoising step of this block.

    Returns:
        bool [S, B], a subset of `masked`.
    """
    count = count.clamp(min=1)[:, None]
    ranked = torch.where(masked, confidence.double(), float("-inf"))
    best_first = torch.argsort(ranked, dim=1, descending=True, stable=True)  # stable: ties go to the lowest index
    most_confident = torch.argsort(best_first, dim=1) < count
    leftmost = masked.cumsum(1) <= count
    above = (remasking == Remasking.DYNAMIC)[:, None] & (confidence > threshold[:, None])
    chosen = torch.where((remasking == Remasking.SEQUENTIAL)[:, None], leftmost, most_confident | above)
    return (chosen | last_step[:, None]) & masked
