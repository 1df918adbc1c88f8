"""top-k and top-p: which tokens are left to draw from, and how likely each is then.

Only the kept tokens are held on to. Where a few of the likeliest tokens settle what is kept, the vocabulary is not
sorted; the result is the same as if it were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CANDIDATES = 256  # most filters keep fewer tokens than this
_SMALL = 2048  # a vocabulary of this size is sorted as fast as its candidates are found
_SORTED_AT_ONCE = 2**25  # scores


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens that the filters keep, at N positions.

    ids: int64 [N, K], rising; the size of the vocabulary where a position keeps fewer.
    weight: float64 [N, K], proportional to their probabilities; 0 where a position keeps fewer.

    K depends on all positions, so sums are taken in order: zeros at the end then change no bit of them.
    """

    ids: Tensor
    weight: Tensor

    @property
    def probability(self) -> Tensor:
        """float64 [N, K]."""
        return self.weight / self.weight.cumsum(-1)[:, -1:]

    def logprob(self, token: Tensor) -> Tensor:
        """float64 [N], of one kept token each."""
        return torch.where(self.ids == token[:, None], self.probability, 0.0).sum(-1).log()

    def draw(self, uniform: Tensor) -> Tensor:
        """The token at which the cumulative sum passes `uniform` [N] of its total, int64 [N]."""
        cumulative = self.weight.cumsum(-1)
        place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        return self.ids.gather(1, place.clamp(max=self.ids.shape[1] - 1))[:, 0]


def keep(scores: Tensor, highest: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor) -> Kept:
    """Apply top-k, then top-p to what is left; likelier tokens come first, lower ids among equals.

    Args:
        scores: [N, V], unnormalised. highest: [N], the largest of each row.
        total: float64 [N], the sum of exp(score - highest).
        top_k: int [N], 0 keeps all. top_p: float64 [N], 1 keeps all.
    """
    size = scores.shape[1]
    rest, parts = torch.arange(len(scores), device=scores.device), []
    if size > _SMALL:
        best, ids, settled = _candidates(scores, highest, total, top_k, top_p)
        rows, rest = torch.nonzero(settled)[:, 0], torch.nonzero(~settled)[:, 0]
        parts.append((rows, best[rows], ids[rows]))
    for rows in rest.split(max(1, _SORTED_AT_ONCE // size)):
        parts.append((rows, *scores[rows].sort(dim=-1, descending=True, stable=True)))
    found = [
        (rows, _nucleus(ordered, order, highest[rows], total[rows], top_k[rows], top_p[rows], size))
        for rows, ordered, order in parts
        if len(rows)
    ]
    widest = max(kept.ids.shape[1] for _, kept in found)
    ids = torch.full((len(scores), widest), size, device=scores.device)
    weight = total.new_zeros((len(scores), widest))
    for rows, kept in found:
        width = kept.ids.shape[1]
        ids[rows, :width], weight[rows, :width] = kept.ids, kept.weight
    return Kept(ids, weight)


def _candidates(
    scores: Tensor, highest: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens in order: their scores and ids [N, K], and where they settle what is kept, bool [N]."""
    best, ids = scores.topk(_CANDIDATES, dim=-1)
    edge = best[:, -1:]
    by_id = ids.argsort(-1)  # topk leaves the order of equals open
    best, order = best.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_id).gather(1, order)
    no_more = (edge == float("-inf"))[:, 0]  # the candidates are all that can be drawn
    no_equal_outside = (scores >= edge).sum(-1) == _CANDIDATES
    held = (best - highest[:, None]).double().exp().sum(-1)
    enough = torch.where(top_k > 0, top_k <= _CANDIDATES, (top_p < 1) & (held >= top_p * total))
    return best, ids, no_more | no_equal_outside & enough


def _nucleus(
    ordered: Tensor, ids: Tensor, highest: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor, size: int
) -> Kept:
    """What the filters keep of tokens that are in order of their scores [N, M]."""
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    weight = (ordered - highest[:, None]).double().exp()
    weight = torch.where(rank < torch.where(top_k > 0, top_k, size)[:, None], weight, 0.0)
    cumulative = weight.cumsum(-1)
    whole = torch.where(top_k > 0, cumulative[:, -1], total)
    ahead = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))  # weight of the tokens that are likelier
    inside = (ahead < (top_p * whole)[:, None]) | (top_p >= 1)[:, None] | (rank == 0)
    weight = torch.where(inside, weight, 0.0)
    width = int((weight > 0).sum(-1).max())
    ids, order = torch.where(weight > 0, ids, size)[:, :width].sort(-1)
    return Kept(ids, weight[:, :width].gather(1, order))
