"""Which of the sampled tokens are kept at a denoising step.

All requests of a batch are decided together, each under its own policy; `_POLICIES` has one entry for each. What a
policy may do is fixed here:
  - it chooses among masked positions only: a known token, the prompt's tail included, is never touched;
  - it takes at least one position while any is masked, and all that remain at the last denoising step: no block is
    committed with a mask in it;
  - equal confidences are settled by the lowest index.

Sources: TraceRL, arXiv 2509.06949, section 5.1; ENTROPY_BOUNDED: arXiv 2505.24857.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Remasking(IntEnum):
    """The unmasking policies, by the names of their flags."""

    STATIC = 0  # the n most confident positions, n from the schedule
    DYNAMIC = 1  # every position above the threshold, or the n most confident if those are fewer than n
    SEQUENTIAL = 2  # the n first masked positions
    ENTROPY_BOUNDED = 3  # as many of the least uncertain as the bound on their summed entropy allows, at least one


def scheduled_count(block_size: Tensor, denoising_steps: Tensor, step: Tensor) -> Tensor:
    """How many tokens a block unmasks at its `step`-th denoising step (0-based): B/S, the remainder spread over the
    first steps.

    Args: integer tensors of one shape [S], one entry per request. Returns the same shape.
    """
    return block_size // denoising_steps + (step < block_size % denoising_steps).to(block_size.dtype)


@dataclass(frozen=True, slots=True)
class UnmaskRules:
    """How S requests choose; each [S].

    remasking: int, a `Remasking`.
    count: int, the scheduled number of tokens (`scheduled_count`).
    threshold: float, used by DYNAMIC: a strict bound.
    entropy_bound: float, used by ENTROPY_BOUNDED, in nats: a strict bound.
    last_step: bool, True at the request's last denoising step of this block.
    """

    remasking: Tensor
    count: Tensor
    threshold: Tensor
    entropy_bound: Tensor
    last_step: Tensor


@dataclass(frozen=True, slots=True)
class _Block:
    """What a policy chooses from; each [S, B].

    masked: bool. confidence: float64, -inf where known.
    rank: int, 0 for the most confident; known positions come last.
    """

    masked: Tensor
    confidence: Tensor
    rank: Tensor


def select(rules: UnmaskRules, confidence: Tensor, masked: Tensor) -> Tensor:
    """Positions to unmask now.

    Args:
        confidence: float [S, B] of the token sampled at each position; read only where masked. ENTROPY_BOUNDED takes it
            for minus the entropy.
        masked: bool [S, B].

    Returns:
        bool [S, B], a subset of `masked`.
    """
    confidence = torch.where(masked, confidence.double(), float("-inf"))
    best_first = torch.argsort(confidence, dim=1, descending=True, stable=True)  # stable: ties go to the lowest index
    block = _Block(masked, confidence, torch.argsort(best_first, dim=1))
    chosen = rules.last_step[:, None].expand_as(masked)
    for name, policy in _POLICIES.items():
        chosen = chosen | ((rules.remasking == name)[:, None] & policy(rules, block))
    return chosen & masked


def _most_confident(rules: UnmaskRules, block: _Block) -> Tensor:
    return block.rank < rules.count.clamp(min=1)[:, None]


def _above_threshold(rules: UnmaskRules, block: _Block) -> Tensor:
    return (block.confidence > rules.threshold[:, None]) | _most_confident(rules, block)


def _leftmost(rules: UnmaskRules, block: _Block) -> Tensor:
    return block.masked.cumsum(1) <= rules.count.clamp(min=1)[:, None]


def _least_entropy(rules: UnmaskRules, block: _Block) -> Tensor:
    """The longest run of the surest positions whose entropies add up to less than the bound."""
    entropy = torch.zeros_like(block.confidence).scatter(1, block.rank, -block.confidence)  # surest first
    inside = (entropy.cumsum(1) < rules.entropy_bound[:, None]).gather(1, block.rank)
    return inside | (block.rank == 0)


_POLICIES = {
    Remasking.STATIC: _most_confident,
    Remasking.DYNAMIC: _above_threshold,
    Remasking.SEQUENTIAL: _leftmost,
    Remasking.ENTROPY_BOUNDED: _least_entropy,
}
