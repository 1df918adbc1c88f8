"""Drawing one token per masked position from the policy.

The policy is a distribution over the vocabulary (model/policy.py). top-k and top-p shape only what is drawn;
temperature 0 takes the most likely token. Each position spends one uniform number through the inverse of its cumulative
distribution in token order, so a draw depends on its key and its distribution, not on the batch around it.

The vocabulary is passed over as few times as possible: exponentials and sums of chunks of about sqrt(V) tokens, while a
few rows lie in the processor's cache; the draw then looks at the sums of the chunks and at one chunk. What only some
rows ask for (filters, other confidences, the most likely token) is worked out for these rows alone.

Invariants (tests/diffusion/test_sampling.py):
  - a row's result is the same, bit by bit, whatever the other rows are;
  - the token is that of the plain cumulative sum, but for uniform numbers within rounding of a boundary;
  - a token of score -inf is never drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megatron_dlm.diffusion.filters import keep

_SLAB = 2**17  # scores per thread that are worked on together on a CPU: with their tables they stay in its cache
_SLAB_ON_DEVICE = 2**26  # elsewhere only the memory counts
_LANES = 16  # chunks are multiples of this, so that vector instructions meet every row at the same offset
_NOTHING = -1000.0  # exp of this is 0 in every precision; unlike -inf it may be multiplied by that


class Confidence(IntEnum):
    """What a drawn token is ranked by when positions are chosen to be unmasked; larger is surer."""

    SAMPLED = 0  # probability of the token under the distribution that it was drawn from
    UNTEMPERED = 1  # its probability under the policy at temperature 1
    MARGIN = 2  # the largest probability less the second largest
    ENTROPY = 3  # minus the entropy, in nats


@dataclass(frozen=True, slots=True)
class DrawRules:
    """How N positions are drawn; each [N].

    greedy: bool: take the most likely token (lowest id among equals); the filters do not matter then.
    top_k: int: keep the k most likely tokens; 0 keeps all.
    top_p: float64: of these keep the smallest set of most likely tokens that holds this much probability; 1 keeps all.
    temperature: float64, the policy's, which the scores have been divided by.
    confidence: int, a `Confidence`.
    """

    greedy: Tensor
    top_k: Tensor
    top_p: Tensor
    temperature: Tensor
    confidence: Tensor

    @property
    def filtered(self) -> Tensor:
        """bool [N], which are drawn from less than the whole policy by filters."""
        return ((self.top_k > 0) | (self.top_p < 1)) & ~self.greedy


@dataclass(frozen=True, slots=True)
class Asked:
    """Which rows ask for more than a plain draw; int64 each. On a GPU the host waits for the device to find out, so who
    draws by the same rules again and again finds out once.

    greedy: rows. filtered: rows that are not greedy.
    measured: by `Confidence`, rows that are ranked by it. of_filtered: the same, as places in `filtered`.
    """

    greedy: Tensor
    filtered: Tensor
    measured: dict[Confidence, Tensor]
    of_filtered: dict[Confidence, Tensor]

    @classmethod
    def by(cls, rules: DrawRules) -> Asked:
        filtered = _where(rules.filtered)
        measured = {kind: _where(rules.confidence == kind) for kind in _MEASURES}
        of_filtered = {kind: _where(rules.confidence[filtered] == kind) for kind in _MEASURES_OF_KEPT}
        return cls(_where(rules.greedy), filtered, measured, of_filtered)


@dataclass(frozen=True, slots=True)
class Draws:
    """What was drawn at N positions; each [N].

    token: int64. logprob: float64, log-probability under the policy. sampling_logprob: float64, under the distribution
        that was drawn from (after top-k and top-p; 0 where greedy).
    confidence: float64, what the rules name. SAMPLED, MARGIN and ENTROPY are of the distribution that was drawn from,
        and of the policy where greedy.
    """

    token: Tensor
    logprob: Tensor
    sampling_logprob: Tensor
    confidence: Tensor


def draw(scores: Tensor, uniform: Tensor, rules: DrawRules, asked: Asked | None = None) -> Draws:
    """Sample from unnormalised scores.

    Args:
        scores: [N, V] (fp32 or fp64): logits divided by the policy's temperature, -inf for banned tokens; at least one
            is finite in each row.
        uniform: float64 [N] in [0, 1).
        rules: how each row is drawn. asked: `Asked.by` of them, if it is known.
    """
    asked = asked or Asked.by(rules)
    highest, mass, chunk = _mass(scores)
    cumulative = mass.cumsum(-1)
    total = cumulative[:, -1]
    token = _inverse(scores, highest, cumulative, chunk, uniform)
    greedy = asked.greedy
    token[greedy] = _rows(scores, greedy).argmax(-1)
    filtered, kept = asked.filtered, None
    if len(filtered):
        own = (highest[filtered], total[filtered], rules.top_k[filtered], rules.top_p[filtered])
        kept = keep(_rows(scores, filtered), *own)
        token[filtered] = kept.draw(uniform[filtered])
    logprob = (scores.gather(1, token[:, None])[:, 0] - highest).double() - total.log()
    drawn_from = logprob.clone()
    if kept is not None:
        drawn_from[filtered] = kept.logprob(token[filtered])
    confidence = drawn_from.exp()
    for kind, measure in _MEASURES.items():
        rows = asked.measured[kind]
        if len(rows):
            policy = _Policy(_rows(scores, rows), highest[rows], total[rows], rules.temperature[rows])
            confidence[rows] = measure(policy, token[rows])
    if kept is not None:
        for kind, measure in _MEASURES_OF_KEPT.items():
            among = asked.of_filtered[kind]
            confidence[filtered[among]] = measure(kept.probability[among])
    return Draws(token, logprob, torch.where(rules.greedy, 0.0, drawn_from), confidence)


def _where(condition: Tensor) -> Tensor:
    return torch.nonzero(condition)[:, 0]


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """The same as table[rows], without a copy where that is all of them."""
    return table if len(rows) == len(table) else table[rows]


def _mass(scores: Tensor, scale: Tensor | None = None, moment: bool = False) -> tuple[Tensor, Tensor, int]:
    """Sums of exp(x) over chunks of tokens, x = scale * (score - highest); with `moment`, of x exp(x).

    Args:
        scale: [N]; None is 1.

    Returns:
        the highest score of each row [N], the sums float64 [N, C], and the tokens per chunk.
    """
    n, v = scores.shape
    chunk = -(-math.isqrt(v) // _LANES) * _LANES
    chunks = -(-v // chunk)
    slab = _SLAB * torch.get_num_threads() if scores.device.type == "cpu" else _SLAB_ON_DEVICE
    rows = max(1, slab // (chunk * chunks))
    table = scores.new_zeros(min(rows, n), chunks * chunk)  # what lies behind the vocabulary stays zero
    highest = scores.new_empty(n)
    mass = scores.new_empty((n, chunks), dtype=torch.float64)
    for first in range(0, n, rows):
        part, place = scores[first : first + rows], slice(first, first + rows)
        highest[place] = part.amax(-1)
        used = table[: len(part)]
        weights = torch.sub(part, highest[place, None], out=used[:, :v])
        if scale is not None:
            weights *= scale[place, None].to(weights.dtype)
        exponent = weights.clamp(min=_NOTHING) if moment else None
        weights.exp_()
        if moment:
            weights *= exponent
        mass[place] = used.view(-1, chunks, chunk).sum(-1, dtype=torch.float64)
    return highest, mass, chunk


def _inverse(scores: Tensor, highest: Tensor, cumulative: Tensor, chunk: int, uniform: Tensor) -> Tensor:
    """The token at which the cumulative sum in token order passes `uniform` of its total, int64 [N].

    Args:
        cumulative: float64 [N, C], of the sums of chunks.
    """
    v, last = scores.shape[1], cumulative.shape[1] - 1
    goal = uniform[:, None] * cumulative[:, -1:]  # below the total, because uniforms have 53 bits and are below 1
    where = torch.searchsorted(cumulative, goal, right=True).clamp(max=last)
    before = torch.where(where > 0, cumulative.gather(1, (where - 1).clamp(min=0)), 0.0)
    ids = where * chunk + torch.arange(chunk, device=scores.device)  # [N, chunk]
    # Behind the vocabulary its last token stands again and again: whatever leads there means that token.
    inner = (scores.gather(1, ids.clamp(max=v - 1)) - highest[:, None]).exp().double().cumsum(-1)
    # A goal at the chunk's very end may round to more than its sum: the last token that adds to it is meant then.
    rest = torch.minimum(goal - before, torch.nextafter(inner[:, -1:], torch.zeros_like(goal)))
    within = torch.searchsorted(inner, rest, right=True)
    return (where * chunk + within).clamp(max=v - 1)[:, 0]


@dataclass(frozen=True, slots=True)
class _Policy:
    """The policy at n positions: scores [n, V], their highest [n], the sum of exp(score - highest), the temperature."""

    scores: Tensor
    highest: Tensor
    total: Tensor
    temperature: Tensor


def _untempered(policy: _Policy, token: Tensor) -> Tensor:
    highest, mass, _ = _mass(policy.scores, policy.temperature)
    gap = (policy.scores.gather(1, token[:, None])[:, 0] - highest).double()
    return (gap * policy.temperature).exp() / mass.sum(-1)


def _margin(policy: _Policy, token: Tensor) -> Tensor:
    best = policy.scores.topk(min(2, policy.scores.shape[1])).values
    first, *second = ((best - policy.highest[:, None]).double().exp() / policy.total[:, None]).unbind(-1)
    return first - second[0] if second else first


def _minus_entropy(policy: _Policy, token: Tensor) -> Tensor:
    _, moment, _ = _mass(policy.scores, moment=True)
    return (moment.sum(-1) / policy.total - policy.total.log()).clamp(max=0)  # p log p = p x - p log(total)


def _margin_of_kept(probability: Tensor) -> Tensor:
    first, *second = probability.topk(min(2, probability.shape[1])).values.unbind(-1)
    return first - second[0] if second else first


def _minus_entropy_of_kept(probability: Tensor) -> Tensor:
    return torch.xlogy(probability, probability).cumsum(-1)[:, -1]  # see Kept


_MEASURES = {
    Confidence.UNTEMPERED: _untempered,
    Confidence.MARGIN: _margin,
    Confidence.ENTROPY: _minus_entropy,
}
_MEASURES_OF_KEPT = {Confidence.MARGIN: _margin_of_kept, Confidence.ENTROPY: _minus_entropy_of_kept}
