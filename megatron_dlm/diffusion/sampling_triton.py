"""`sampling.draw` from logits as kernels that wait for nobody: temperature, filters, keyed draw, confidence.

Without filters the vocabulary is read once, as the matrix product left it: each program of the first kernel sums up one
piece of one row. The last kernel has a program for each row, which finds the piece in which the cumulative distribution
passes the row's uniform number, reads that piece again, and finds the token. The uniform number is made there from the
row's key (diffusion/keys.py), so what a pass needs of the sampler is these two launches, in shapes that depend on
nothing drawn. Where any row has top-k or top-p there is a third launch between them, which reads the rows that have
them some more times to find what is kept (filters_triton.py); the last kernel then draws among that.

Rows are those of torch's sampler: the same keys, the same inverse of the cumulative distribution in token order, the
same confidences. Sums are added in another order, so a token can be another where the uniform number lies within
rounding of a boundary.

Import it where it is used: it needs triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.diffusion import filters_triton
from megatron_dlm.diffusion.sampling import DrawRules, Draws
from megatron_dlm.diffusion.scores_triton import ENTROPY, LEAST, MARGIN, UNTEMPERED, VARYING, is_filtered, scores

_PIECE = 4096  # logits that a program holds
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # these are of diffusion/keys.py
_MIX_1, _MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)


def draw_logits(
    logits: Tensor,
    slot: Tensor,
    position: Tensor,
    rules: DrawRules,
    streams: Tensor,
    steps: Tensor,
    size: int,
    mask_id: int,
    filters: bool = True,
) -> Draws:
    """Sample a token for each of N positions.

    Args:
        logits: [N, V], a line behind the other, in fp32, bf16 or fp16; of the first `size` tokens, without `mask_id`,
            at least one is finite in each row.
        slot: int64 [N], where in the following [S] the rules of a row stand. position: int64 [N], in its text.
        rules: [S]. streams, steps: int64 [S], of the draws, and denoising steps that were taken.
        filters: whether any of the rows may have top-k or top-p; False means that none has, and saves looking.
    """
    n, width = logits.shape
    device, piece = logits.device, min(_PIECE, max(64, triton.next_power_of_2(width)))
    pieces = triton.cdiv(width, piece)
    token = torch.empty(n, dtype=torch.int64, device=device)
    logprob, sampling_logprob, confidence = torch.empty((3, n), dtype=torch.float64, device=device)
    if n:
        peak = torch.empty((n, pieces), dtype=torch.float32, device=device)
        best = torch.empty((n, pieces), dtype=torch.int32, device=device)
        mass, more = torch.empty((2, n, pieces), dtype=torch.float64, device=device)
        kept, moment = torch.empty((2, n, pieces) if filters else (2, 1, 1), dtype=torch.float64, device=device)
        edge = torch.empty(n, dtype=torch.float32, device=device)
        last = torch.empty(n, dtype=torch.int32, device=device)
        greedy, warps = rules.greedy.view(torch.uint8), max(1, piece // 512)
        spread = dict(PIECE=piece, PIECES=triton.next_power_of_2(pieces))
        _pieces[(n, pieces)](
            logits, slot, rules.temperature, rules.confidence, peak, best, mass, more,
            width, size, mask_id, pieces, PIECE=piece, num_warps=warps,
        )  # fmt: skip
        if filters:
            filters_triton.keep[(n,)](
                logits, slot, rules.temperature, rules.confidence, greedy, rules.top_k, rules.top_p, peak, mass,
                kept, moment, edge, last,
                width, size, mask_id, pieces, **spread,
                TILE=min(piece, filters_triton.TILE), WAYS=filters_triton.WAYS, num_warps=warps,
            )  # fmt: skip
        _tokens[(n,)](
            logits, slot, position, rules.temperature, rules.confidence, greedy, rules.top_k, rules.top_p, streams,
            steps, peak, best, mass, more, kept, moment, edge, last, token, logprob, sampling_logprob, confidence,
            width, size, mask_id, pieces, **spread, FILTERS=filters, num_warps=warps,
        )  # fmt: skip
    return Draws(token, logprob, sampling_logprob, confidence)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _uniform(stream, first, second):
    """diffusion/keys.py's `uniforms` of a stream and two counters."""
    x = _mix(stream.to(tl.uint64))
    x = _mix(x + (first + 1).to(tl.uint64) * _GOLDEN)
    x = _mix(x + (second + 1).to(tl.uint64) * _GOLDEN)
    return (x >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit(do_not_specialize=VARYING)
def _pieces(
    logits, slot, temperatures, kinds, peak, best, mass, more,
    width, size, mask_id, pieces, PIECE: tl.constexpr,
):  # fmt: skip
    """Of a piece of a row: the highest score and its first place, the sum of exponentials below it, and what the row's
    confidence needs besides (0 where it needs nothing)."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = tl.load(slot + row)
    temperature, kind = tl.load(temperatures + which).to(tl.float32), tl.load(kinds + which)
    at = number * PIECE + tl.arange(0, PIECE)
    score = scores(logits + row * width, at, width, size, mask_id, temperature)
    top, place = tl.max(score, 0), tl.argmax(score, 0)
    gap = score - tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(gap)
    extra = tl.full((), 0.0, tl.float64)
    if kind == UNTEMPERED:
        extra = tl.sum(tl.exp(gap * temperature).to(tl.float64), 0)
    if kind == MARGIN:
        extra = tl.max(tl.where(at == number * PIECE + place, float("-inf"), score), 0).to(tl.float64)
    if kind == ENTROPY:
        extra = tl.sum((weight * tl.where(weight > 0, gap, 0.0)).to(tl.float64), 0)
    here = row * pieces + number
    tl.store(peak + here, top)
    tl.store(best + here, number * PIECE + place)
    tl.store(mass + here, tl.sum(weight.to(tl.float64), 0))
    tl.store(more + here, extra)


@triton.jit(do_not_specialize=VARYING)
def _tokens(
    logits, slot, position, temperatures, kinds, greedy, top_k, top_p, streams, steps,
    peak, best, mass, more, kept, moment, edge, last, token, logprob, sampling_logprob, confidence,
    width, size, mask_id, pieces, PIECE: tl.constexpr, PIECES: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """The token of a row, its log-probabilities and its confidence."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.load(slot + row)
    exact_temperature, kind = tl.load(temperatures + which), tl.load(kinds + which)
    temperature, line = exact_temperature.to(tl.float32), logits + row * width
    number = tl.arange(0, PIECES)
    real = number < pieces
    here = row * pieces + number
    tops = tl.load(peak + here, mask=real, other=float("-inf"))
    highest = tl.max(tops, 0)
    # A piece that has nothing to add may have no score at all: its distance must still be a number.
    gap = (tl.where(tops - highest > LEAST, tops, highest) - highest).to(tl.float64)
    counts = real & (tops - highest > LEAST)
    scale = tl.where(counts, tl.exp(gap), 0.0)
    masses = tl.load(mass + here, mask=real, other=0.0)
    policy_share = scale * masses
    policy_total = tl.sum(policy_share, 0)

    # What is drawn from: the policy, or what the filters keep of it.
    share, total, drawable = policy_share, policy_total, counts
    is_greedy = tl.load(greedy + which) != 0
    if FILTERS:
        narrowed = is_filtered(is_greedy.to(tl.int32), tl.load(top_k + which), tl.load(top_p + which))
        lowest = tl.where(narrowed, tl.load(edge + row), float("-inf"))
        last_equal = tl.load(last + row)
        share = tl.where(narrowed, tl.load(kept + here, mask=real, other=0.0), policy_share)
        total = tl.sum(share, 0)
        drawable = counts & (share > 0)
    goal = _uniform(tl.load(streams + which), tl.load(position + row), tl.load(steps + which)) * total

    # The piece in which the cumulative sum passes the goal: rounding may let it end below, the last one is meant then.
    passed = tl.min(tl.where((tl.cumsum(share, 0) > goal) & drawable, number, PIECES), 0)
    chosen = tl.where(passed < PIECES, passed, tl.max(tl.where(drawable, number, 0), 0))
    rest = goal - tl.sum(tl.where(number < chosen, share, 0.0), 0)
    at = chosen * PIECE + tl.arange(0, PIECE)
    score = scores(line, at, width, size, mask_id, temperature)
    weight = tl.exp(score - highest).to(tl.float64)
    if FILTERS:
        weight = tl.where((score > lowest) | ((score == lowest) & (at <= last_equal)), weight, 0.0)
    found = tl.min(tl.where((tl.cumsum(weight, 0) > rest) & (weight > 0), at, width), 0)
    found = tl.where(found < width, found, tl.max(tl.where(weight > 0, at, 0), 0))
    first_best = tl.min(tl.where(tops == highest, number, PIECES), 0)  # of the first of the most likely tokens
    found = tl.where(is_greedy, tl.load(best + row * pieces + tl.minimum(first_best, pieces - 1)), found)
    found = tl.minimum(found, width - 1)  # logits that are no numbers lead anywhere

    below = (tl.div_rn(tl.load(line + found).to(tl.float32), temperature) - highest).to(tl.float64)
    value = below - tl.log(policy_total)
    sampled = below - tl.log(total)
    confident = tl.exp(sampled)
    if kind == UNTEMPERED:
        extra = tl.load(more + here, mask=counts, other=0.0)
        untempered = tl.sum(tl.where(counts, extra * tl.exp(gap * exact_temperature), 0.0), 0)
        confident = tl.exp(below * exact_temperature) / untempered
    if kind == MARGIN:
        extra = tl.load(more + here, mask=real, other=float("-inf"))
        second = tl.max(tl.where(number == first_best, extra, tops.to(tl.float64)), 0)
        second = tl.exp(second - highest.to(tl.float64))
        # The most likely token weighs 1. If it is all that is kept there is no second, else the second is kept, too.
        confident = (1.0 - tl.where(total > 1.0, second, 0.0)) / total
    if kind == ENTROPY:
        extra = tl.load(more + here, mask=counts, other=0.0)
        moments = scale * (extra + masses * gap)
        if FILTERS:
            moments = tl.where(narrowed, tl.load(moment + here, mask=real, other=0.0), moments)
        confident = tl.minimum(tl.sum(moments, 0) / total - tl.log(total), 0.0)
    tl.store(token + row, found.to(tl.int64))
    tl.store(logprob + row, value)
    tl.store(sampling_logprob + row, tl.where(is_greedy, 0.0, sampled))
    tl.store(confidence + row, confident)
