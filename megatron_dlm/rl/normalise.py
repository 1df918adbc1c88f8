"""How much each unit of an update counts: the normalisation of the loss, computed from the records of all responses.

A unit is what has one ratio: a target, a token or a response (rl/methods.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONSTANT, LONGEST, SLICE, RESPONSE, TOKEN = "constant", "longest", "slice", "response", "token"


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one response: its targets, its units, its slices (views: the targets of a slice were decided together), and
    the tokens that its targets are of."""

    targets: int
    units: int
    slices: int
    tokens: int


def unit_weights(
    counts: Sequence[Counts], aggregation: str, longest: int, draws: int = 1, whole: bool = False
) -> np.ndarray:
    """Weight of every unit of each response of one update.

    Args:
        counts: of the R responses.
        aggregation: 'constant' and 'longest' divide by R x `longest` (Dr. GRPO, arXiv 2503.20783): every token counts
            the same, whatever its response. 'slice' is the mean over the update's slices of the mean over their
            targets; the weight here is that of a slice, to be divided by its targets. 'response' is the mean over
            responses of the mean over their units, 'token' the mean over all units; where a unit is a whole response,
            it counts with its targets there.
        longest: tokens.
        draws: how often a token is expected among the targets, apart from the chance to be masked at all.
        whole: a unit is a response.

    Returns:
        float64 [R].
    """
    targets = np.array([one.targets for one in counts], dtype=np.float64)
    units = np.array([one.units for one in counts], dtype=np.float64)
    responses = len(counts)
    if aggregation in (CONSTANT, LONGEST):
        return np.full(responses, 1 / (responses * longest * draws))
    if aggregation == SLICE:
        return np.full(responses, slice_weight(counts))
    if aggregation == RESPONSE:
        return 1 / (responses * np.maximum(units, 1))
    return targets / max(targets.sum(), 1) if whole else np.full(responses, 1 / max(units.sum(), 1))


def slice_weight(counts: Sequence[Counts]) -> float:
    """One over the number of slices of an update."""
    return 1 / max(sum(one.slices for one in counts), 1)
