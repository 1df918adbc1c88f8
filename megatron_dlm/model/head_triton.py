"""What the loss head (model/head.py) does with a tile of logits, as two kernels that read it once.

Between two matrix products the head only looks at every logit and puts another number in its place. As operations of
torch, each a pass over memory, with a copy in fp32, that takes many times what the products' own reading and writing
does. Here:

  statistics  of each target the largest score, the sum of exponentials, their mean score and the label's score, in one
              pass over its logits as the product left them;
  gradient    the gradient of the loss by each logit, written over the logit.

Scores are computed in fp32, one number at a time, as model/policy.py says: logit / temperature, rounded once; tokens
outside the policy have none. A target is a program; it goes over its logits in blocks.

Import it where it is used: it needs triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.model.policy import Vocabulary

_BLOCK = 8192  # logits of one target that a program holds at a time
_VARYING = ["first", "size", "mask_id"]  # no kernel of its own for multiples of 16: they say nothing about addresses


def statistics(
    logits: Tensor, labels: Tensor, temperature: Tensor | float, vocabulary: Vocabulary, first: int, with_moment: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the logits of n targets.

    Args:
        logits: [n, W], a line behind the other, of the tokens from `first` on. labels: int64 [n].
        temperature: a number, or [n] of them.

    Returns:
        float32 [n] each: the highest score, at least the lowest number over 4, which is what a shard without a token of
        the policy has; the sum of exp(x), x = score - highest; with_moment that of x exp(x), else anything; and the
        label's score, 0 where the label is not among these tokens.
    """
    n, width = logits.shape
    highest, total, moment, picked = torch.empty((4, n), dtype=torch.float32, device=logits.device)
    if n:
        block = _block(width)
        _statistics[(n,)](
            logits, labels, _column(temperature, labels), highest, total, moment, picked,
            width, first, vocabulary.size, vocabulary.mask_id,
            LOWEST=torch.finfo(torch.float32).min / 4, WITH_MOMENT=with_moment, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return highest, total, moment, picked


def gradient_(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    log_normaliser: Tensor,
    by_label: Tensor,
    entropies: Tensor | None,
    by_mean: Tensor | None,
    vocabulary: Vocabulary,
    first: int,
) -> Tensor:
    """Write over each logit of n targets the gradient of a loss by it: g (1[j = l] - p_j) - e p_j (log p_j + H).

    Args:
        logits, labels, temperature: as in `statistics`.
        log_normaliser: float32 [n]. by_label: float32 [n], g, the loss by the label's log-probability over the
            temperature.
        entropies, by_mean: float32 [n], H and e, the loss by the entropy over the temperature; None: it has no part.

    Returns:
        `logits`.
    """
    n, width = logits.shape
    if n and width:
        block = _block(width)
        _gradient[(n, triton.cdiv(width, block))](
            logits, labels, _column(temperature, labels), log_normaliser, by_label,
            log_normaliser if entropies is None else entropies, by_label if by_mean is None else by_mean,
            width, first, vocabulary.size, vocabulary.mask_id,
            WITH_ENTROPY=by_mean is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return logits


def _column(temperature: Tensor | float, labels: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.float()
    return torch.full(labels.shape, temperature, dtype=torch.float32, device=labels.device)


def _block(width: int) -> int:
    return min(_BLOCK, max(64, triton.next_power_of_2(width)))


def _warps(block: int) -> int:
    """16 logits a thread, 32 threads a warp."""
    return max(1, block // 512)


@triton.jit(do_not_specialize=_VARYING)
def _statistics(
    logits, labels, temperatures, highest, total, moment, picked,
    width, first, size, mask_id,
    LOWEST: tl.constexpr, WITH_MOMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * width
    temperature = tl.load(temperatures + row)
    column = tl.arange(0, BLOCK)
    # Of the blocks so far: the highest score, and the sums below it. LOWEST is finite, so that nothing is inf - inf.
    peak = tl.full((), LOWEST, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        at = start + column
        logit = tl.load(line + at, mask=at < width, other=0.0)  # this mask alone lets it load many at once
        inside = (at < width) & (first + at < size) & (first + at != mask_id)
        score = tl.div_rn(logit.to(tl.float32), temperature)
        score = tl.where(inside, score, float("-inf"))
        above = tl.maximum(peak, tl.max(score, 0))
        gap = peak - above
        shrink = tl.exp(gap)
        weight = tl.exp(score - above)
        if WITH_MOMENT:
            mean = shrink * (mean + mass * gap) + tl.sum(weight * tl.where(inside, score - above, 0.0), 0)
        mass = shrink * mass + tl.sum(weight, 0)
        peak = above
    label = tl.load(labels + row)
    place = label - first
    here = (place >= 0) & (place < width)
    chosen = tl.div_rn(tl.load(line + place, mask=here, other=0.0).to(tl.float32), temperature)
    chosen = tl.where(here & ((label >= size) | (label == mask_id)), float("-inf"), chosen)
    tl.store(highest + row, peak)
    tl.store(total + row, mass)
    tl.store(moment + row, mean)
    tl.store(picked + row, chosen)


@triton.jit(do_not_specialize=_VARYING)
def _gradient(
    logits, labels, temperatures, log_normaliser, by_label, entropies, by_mean,
    width, first, size, mask_id,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row.to(tl.int64) * width + at
    inside = at < width
    logit = tl.load(place, mask=inside, other=0.0)
    logprob = tl.div_rn(logit.to(tl.float32), tl.load(temperatures + row)) - tl.load(log_normaliser + row)
    probability = tl.exp(logprob)
    share = tl.load(by_label + row)
    gradient = -share * probability
    if WITH_ENTROPY:
        gradient -= tl.load(by_mean + row) * probability * (logprob + tl.load(entropies + row))
    gradient += tl.where(first + at == tl.load(labels + row), share, 0.0)
    gradient = tl.where((first + at < size) & (first + at != mask_id), gradient, 0.0)
    tl.store(place, gradient.to(logit.dtype), mask=inside)
