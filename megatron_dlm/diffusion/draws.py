"""States of a response that are drawn, not replayed: views for the RL methods that do not follow the trace.

Each function returns the views of one response. The weight of a target is its coefficient in the log-probability that
its method compares between policies: 1 where each target is compared for itself, else a share in an estimate of the
log-probability of a token, or of the whole response. What stands behind the response is hidden like the rest, and never
predicted. `learned`, bool [R], says which tokens of the response are predicted where they are hidden.

Every draw is a function of the stream that the caller gives, the number of the draw and the position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Views, no_views, windows

# Counters that keep kinds of draws of one stream apart
_RATIO, _MASK = 0, 1


@dataclass(frozen=True, slots=True)
class MaskDraws:
    """How masks are drawn.

    Attributes:
        draws: masks, pairs of masks, or quadrature nodes for a response.
        low, high: mask ratios are uniform between them.
        per: what shares a ratio, 'response', 'block' or 'token'.
        spread: `quadrature_views`.
    """

    draws: int = 1
    low: float = 0.1
    high: float = 0.9
    per: str = "response"
    spread: float = 0.2

    def draw(self, stream: int, number: int, position: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mask number `number` of a response, bool [b, W], and the ratio that each token had, float64 [b, W].

        Args:
            position: [b, W]. block: [b], index of each window's block.
        """
        unit = {
            "response": np.zeros_like(position),
            "block": np.broadcast_to(block[:, None], position.shape),
            "token": position,
        }[self.per]
        ratio = self.low + (self.high - self.low) * _uniforms(stream, number, unit, _RATIO)
        return _uniforms(stream, number, position, _MASK) < ratio, ratio


def random_views(trace: Trace, grid: Grid, learned: np.ndarray, stream: int, how: MaskDraws) -> Views:
    """`draws` independent masks; what one hides is predicted.

    Source: the random-masking baseline of TraceRL, arXiv 2509.06949, section 4.1; UniGRPO, arXiv 2505.15809.
    """
    text = _Text.of(trace, grid, learned)
    masks = [how.draw(stream, number, text.position, text.block)[0] for number in range(how.draws)]
    return text.views([(mask, 1.0) for mask in masks])


def coupled_views(trace: Trace, grid: Grid, learned: np.ndarray, stream: int, how: MaskDraws) -> Views:
    """`draws` pairs of a mask and its complement, so that each pair predicts every token once.

    Source: coupled-GRPO, arXiv 2506.20639, section 4.2; as two independent rows, TraceRL's baseline.
    """
    return _coupled(trace, grid, learned, stream, how, lambda ratio: (1.0, 1.0))


def paired_views(trace: Trace, grid: Grid, learned: np.ndarray, stream: int, how: MaskDraws) -> Views:
    """The pairs, and a mask of everything: a token's log-probability is the mean of that under the full mask and those
    under its masks of the pairs.

    Source: coupled-GRPO, arXiv 2506.20639, section 4.2.
    """
    text = _Text.of(trace, grid, learned)
    share = 1 / (how.draws + 1)
    views: list[tuple[np.ndarray, float]] = [(np.ones_like(text.hidable), share)]
    for number in range(how.draws):
        mask, _ = how.draw(stream, number, text.position, text.block)
        views += [(mask, share), (~mask, share)]
    return text.views(views)


def elbo_views(trace: Trace, grid: Grid, learned: np.ndarray, stream: int, how: MaskDraws) -> Views:
    """Pairs whose weights sum to an estimate of the evidence bound per token: 1/t for what a mask of ratio t hides,
    1/(1 - t) for its complement, over 2 x draws x the number of predicted tokens.

    Source: ESPO, arXiv 2512.03759, with antithetic masks.
    """
    count = max(int(_Text.of(trace, grid, learned).target.sum()), 1)
    half = 0.5 / (how.draws * count)
    return _coupled(trace, grid, learned, stream, how, lambda ratio: (half / ratio, half / (1 - ratio)))


def bound_views(trace: Trace, grid: Grid, learned: np.ndarray, stream: int, how: MaskDraws) -> Views:
    """Masks at the nodes t_n of a Gauss-Legendre quadrature on [0, 1]; weights w_n / t_n sum to an estimate of the
    evidence bound of the whole response, a sum over its blocks.

    Source: EBPO (LLaDA2.1, arXiv 2602.08676), which leaves weights and nodes open: the factor 1 / t_n is that of the
        evidence bound, and the nodes are as in GDPO.
    """
    text, (nodes, shares) = _Text.of(trace, grid, learned), quadrature(how.draws)
    masks = [_uniforms(stream, number, text.position, _MASK) < node for number, node in enumerate(nodes)]
    return text.views([(mask, share / node) for mask, node, share in zip(masks, nodes, shares)])


def quadrature_views(trace: Trace, grid: Grid, learned: np.ndarray, stream: int, how: MaskDraws) -> Views:
    """Masks at Gauss-Legendre nodes t_n that hide more of the earlier blocks than of the later ones: the ratio falls
    from t_n + spread to t_n - spread along half a cosine, with mean t_n (and no spread beyond ratios of 0 and 1).
    Weights are the quadrature's over the number
    of targets of each mask, so that they sum to 1: a mean over masks of a mean over their tokens.

    Source: SLIM-RL, arXiv 2607.00208
    """
    text, (nodes, shares) = _Text.of(trace, grid, learned), quadrature(how.draws)
    blocks = len(text.block)
    fall = np.cos(np.pi * (np.arange(blocks) + 0.5) / max(blocks, 1))
    found = []
    for number, (node, share) in enumerate(zip(nodes, shares)):
        ratio = (node + min(how.spread, node, 1 - node) * fall)[:, None]
        mask = _uniforms(stream, number, text.position, _MASK) < ratio
        found.append((mask, share / max(int((mask & text.target).sum()), 1)))
    total = sum(share for (mask, _), share in zip(found, shares) if (mask & text.target).any())
    return text.views([(mask, weight / total) for mask, weight in found] if total else [])


def quadrature(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss-Legendre quadrature on [0, 1]; the weights sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


@dataclass(frozen=True, slots=True)
class _Text:
    """The windows of a response: [b, W] where its tokens can be hidden, and where they can be predicted."""

    block: np.ndarray
    position: np.ndarray
    hidable: np.ndarray
    target: np.ndarray
    beyond: np.ndarray  # what stands behind the trace's last token: a mask in every state
    grid: Grid
    length: int

    @classmethod
    def of(cls, trace: Trace, grid: Grid, learned: np.ndarray) -> _Text:
        prompt = len(trace.prompt_ids)
        block, position = windows(trace, grid)
        target = (position >= prompt) & (position < prompt + len(trace.response_ids))
        target[target] = learned[position[target] - prompt]
        beyond = position >= len(trace.tokens)
        return cls(block, position, position >= prompt, target, beyond, grid, len(trace.tokens))

    def views(self, masks: list[tuple[np.ndarray, np.ndarray | float]]) -> Views:
        """The views of some masks bool [b, W] with the weights of their tokens; windows without a target are left
        out."""
        pieces = []
        for mask, weight in masks:
            masked = (mask & self.hidable) | self.beyond
            target = masked & self.target
            kept = target.any(1)
            weight = np.broadcast_to(weight, mask.shape)
            pieces.append((self.block[kept], self.position[kept], masked[kept], target[kept], weight[kept]))
        if not any(len(piece[0]) for piece in pieces):
            return no_views(self.grid, self.length)
        columns = [np.concatenate(column) for column in zip(*pieces)]
        order = np.argsort(columns[0], kind="stable")  # by block, as everybody expects of views
        return Views(*(column[order] for column in columns))


def _coupled(trace: Trace, grid: Grid, learned: np.ndarray, stream: int, how: MaskDraws, weights) -> Views:
    text = _Text.of(trace, grid, learned)
    found = []
    for number in range(how.draws):
        mask, ratio = how.draw(stream, number, text.position, text.block)
        here, there = weights(ratio)
        found += [(mask, here), (~mask, there)]
    return text.views(found)


def _uniforms(stream: int, number: int, position: np.ndarray, kind: int) -> np.ndarray:
    """float64 like `position`, the draw of mask `number` at each position."""
    counter = torch.full(position.shape, 2 * number + kind, dtype=torch.int64)
    return uniforms(stream, torch.from_numpy(np.ascontiguousarray(position)), counter).numpy()
