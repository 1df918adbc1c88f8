"""top-k and top-p as a kernel that waits for nobody and sorts nothing: where the kept tokens of a row end.

What is kept (filters.py) is every token whose score is above an edge, and of those that are equal to it the first few
by their ids. A program has one row and looks for its edge between the highest score and 87 below it, where exp is
nothing in fp32: it reads the row, counts and sums up the tokens above each of eight bounds in between, goes on between
the two bounds that have the edge between them, and stops where that settles it: one token is left, or equal ones. top-k
and then top-p have an edge each, and the higher one holds. A last pass sums up what is kept, piece by piece, for the
draw (sampling_triton.py).

Traffic over [n, V]: one read for each narrowing and one at the end, of rows with filters alone; nothing of that size is
written. The first bounds halve the distance to the highest score again and again, the others are evenly spread.
Of 151,936 random logits top-k 50 took 2 to 5 narrowings, top-p 0.9 in fp32 5 to 9 and in bf16, where many are equal, 4
to 6. They come close after each other, and a row of 150,000 logits in bf16 has 300 kB: a GPU finds it in its L2 cache.

Sums are added in another order than torch's, with exponentials in fp32, so a token at the boundary of top-p can be kept
here and not there, or the other way around, where the sum is within rounding of it.

Import it where it is used: it needs triton.
"""

import triton
import triton.language as tl

from megatron_dlm.diffusion.scores_triton import ENTROPY, LEAST, VARYING, is_filtered, scores

# 87 / 9^64 is less than the distance of any two numbers: only logits that are none get here.
_MOST_PASSES = tl.constexpr(64)
WAYS = 8  # bounds that are looked at in a pass
TILE = 2048  # logits that a program holds then


@triton.jit(do_not_specialize=VARYING)
def keep(
    logits, slot, temperatures, kinds, greedy, top_k, top_p, peak, mass,
    kept, moment, edges, lasts,
    width, size, mask_id, pieces, PIECE: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Of a row with filters: the edge, the last id of those at it that are kept (-1: none is), and by piece the sum of
    exponentials of what is kept, below the row's highest score, and where the row is ranked by entropy that of their
    products with their exponents."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.load(slot + row)
    most_kept, share = tl.load(top_k + which), tl.load(top_p + which)
    if is_filtered(tl.load(greedy + which), most_kept, share):
        line, temperature = logits + row * width, tl.load(temperatures + which).to(tl.float32)
        number = tl.arange(0, PIECES)
        tops = tl.load(peak + row * pieces + number, mask=number < pieces, other=float("-inf"))
        highest = tl.max(tops, 0)
        near = tops - highest > LEAST
        masses = tl.load(mass + row * pieces + number, mask=near, other=0.0)
        whole = tl.sum(tl.where(near, masses * tl.exp(tl.where(near, tops - highest, 0.0).to(tl.float64)), 0.0), 0)
        edge, equals = highest + LEAST, tl.full((), 0, tl.float64)
        if most_kept > 0:
            edge, equals, whole = _cut(
                line, width, size, mask_id, temperature, highest, True, most_kept.to(tl.float64), TILE, WAYS
            )
        if share < 1:
            own, own_equals, _ = _cut(
                line, width, size, mask_id, temperature, highest, False, share * whole, TILE, WAYS
            )
            equals = tl.where(own > edge, own_equals, tl.where(own == edge, tl.minimum(equals, own_equals), equals))
            edge = tl.maximum(edge, own)

        kind, seen, last = tl.load(kinds + which), tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
        for piece in range(0, pieces):
            at = piece * PIECE + tl.arange(0, PIECE)
            score = scores(line, at, width, size, mask_id, temperature)
            is_equal = score == edge
            order = seen + tl.cumsum(is_equal.to(tl.int32), 0)
            equal_kept = is_equal & (order.to(tl.float64) <= equals)
            gap = tl.where((score > edge) | equal_kept, score - highest, float("-inf"))
            weight = tl.exp(gap)
            seen += tl.sum(is_equal.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(equal_kept, at, -1), 0))
            tl.store(kept + row * pieces + piece, tl.sum(weight.to(tl.float64), 0))
            if kind == ENTROPY:
                product = weight * tl.where(weight > 0, gap, 0.0)
                tl.store(moment + row * pieces + piece, tl.sum(product.to(tl.float64), 0))
        tl.store(edges + row, edge)
        tl.store(lasts + row, last)


@triton.jit
def _cut(
    line, width, size, mask_id, temperature, highest, by_count: tl.constexpr, need,
    TILE: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """The smallest set of the most likely tokens of a row that has `need` tokens, or exponentials with this sum.

    Returns:
        the edge, the number of tokens at it that belong to the set, and the sum of exponentials of all that do.
    """
    way = tl.arange(0, WAYS)
    # The edge is above `low` and at most `high`. What is above these: so many tokens, with these sums.
    low, high = highest + LEAST, highest
    low_count, high_count = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    low_mass, high_mass = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    edge, equals, held = low, tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    part = 1.0 - tl.exp2(-way.to(tl.float32))  # the first bound of the first pass is `low`
    passes = tl.full((), 0, tl.int32)
    while passes < _MOST_PASSES:
        bound = tl.minimum(low + (high - low) * part, high)
        count, mass = tl.zeros((WAYS,), tl.int32), tl.zeros((WAYS,), tl.float64)
        least, most = tl.full((), float("inf"), tl.float32), tl.full((), float("-inf"), tl.float32)
        for start in range(0, width, TILE):
            score = scores(line, start + tl.arange(0, TILE), width, size, mask_id, temperature)
            inside = (score > low) & (score <= high)
            least = tl.minimum(least, tl.min(tl.where(inside, score, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(inside, score, float("-inf")), 0))
            above = score[None, :] > bound[:, None]
            count += tl.sum(above.to(tl.int32), 1)
            mass += tl.sum(tl.where(above, tl.exp(score - highest)[None, :], 0.0), 1).to(tl.float64)
        if passes == 0:
            low_count, low_mass = tl.max(count, 0), tl.max(mass, 0)
        passes += 1
        if least >= most:  # all that are left are equal
            weight = tl.exp(most - highest).to(tl.float64)
            if by_count:
                lacks = need - high_count.to(tl.float64)
            else:
                lacks = tl.ceil((need - high_mass) / weight)
            edge, equals = most, tl.minimum(tl.maximum(lacks, 1.0), (low_count - high_count).to(tl.float64))
            held = high_mass + equals * weight
            passes = tl.full((), _MOST_PASSES, tl.int32)  # it keeps its type in both branches, as Triton asks
        else:
            if by_count:
                lacking = count.to(tl.float64) < need
            else:
                lacking = mass < need
            low_count = tl.min(tl.where(lacking, low_count, count), 0)
            low_mass = tl.min(tl.where(lacking, low_mass, mass), 0)
            high_count = tl.max(tl.where(lacking, count, high_count), 0)
            high_mass = tl.max(tl.where(lacking, mass, high_mass), 0)
            upper = tl.min(tl.where(lacking, bound, high), 0)
            low = tl.max(tl.where(lacking, low, bound), 0)
            high = tl.minimum(upper, most)
            edge, held = low, low_mass
            settled = low_count - high_count <= 1
            if by_count:
                settled = settled | (low_count.to(tl.float64) == need)
            passes = tl.where(settled, _MOST_PASSES, passes)
        part = (way + 1).to(tl.float32) / (WAYS + 1)
    return edge, equals, held
