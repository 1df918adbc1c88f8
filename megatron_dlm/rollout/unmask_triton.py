"""A denoising step's end as one kernel: which drawn tokens are kept (diffusion/unmasking.py), and writing them down.

As operations of torch that is some sixty launches on a few hundred numbers. A program has one block; ranks are counted
from all pairs of its positions.

Import it where it is used: it needs triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.diffusion.sampling import Draws
from megatron_dlm.rollout.batch import RunningBatch

WIDEST = 64  # positions of a block; a program holds the square of it
_DYNAMIC, _SEQUENTIAL, _ENTROPY_BOUNDED = (tl.constexpr(kind) for kind in (1, 2, 3))  # of unmasking.Remasking


def unmask(batch: RunningBatch, draws: Draws, slot: Tensor, position: Tensor, masked: Tensor, version: Tensor) -> None:
    """Write what is kept of the draws for whole blocks into the batch.

    Args:
        draws: [n * B]. slot: int64 [n], none twice but that of nobody. position: int64 [n, B], B at most WIDEST.
        masked: bool [n, B], what may be unmasked. version: int64 [], of the weights; on the device, so that a graph of
            this can be replayed with other weights.
    """
    n, block = position.shape
    if n:
        _unmask[(n,)](
            draws.token, draws.logprob, draws.sampling_logprob, draws.confidence,
            slot, position.contiguous(), masked.contiguous().view(torch.uint8),
            batch.block_size, batch.denoising_steps, batch.block_steps, batch.steps_taken,
            batch.remasking, batch.threshold, batch.entropy_bound,
            batch.tokens, batch.known.view(torch.uint8), batch.step,
            batch.logprob, batch.sampling_logprob, batch.version,
            version, batch.max_length, block, BLOCK=max(2, triton.next_power_of_2(block)),
        )  # fmt: skip


@triton.jit
def _unmask(
    token, logprob, sampling_logprob, confidence,
    slot, position, masked,
    block_size, denoising_steps, block_steps, steps_taken,
    remasking, threshold, entropy_bound,
    tokens_table, known_table, step_table, logprob_table, sampling_logprob_table, version_table,
    weights, length, width, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    which = tl.load(slot + row)
    at = tl.arange(0, BLOCK)
    here = row * width + at
    real = at < width
    free = tl.load(masked + here, mask=real, other=0) != 0
    sure = tl.where(free, tl.load(confidence + here, mask=real, other=0.0), float("-inf"))

    taken, allowed, size = tl.load(block_steps + which), tl.load(denoising_steps + which), tl.load(block_size + which)
    count = tl.maximum(size // allowed + (taken < size % allowed).to(tl.int64), 1)
    # ahead[i, j]: j comes before i, by confidence and then by place; known positions come last.
    other = at[None, :]
    theirs, mine = sure[None, :], sure[:, None]
    ahead = (theirs > mine) | ((theirs == mine) & (other < at[:, None]))
    rank = tl.sum(ahead.to(tl.int32), 1)
    chosen = rank < count
    policy = tl.load(remasking + which)
    if policy == _DYNAMIC:
        chosen = chosen | (sure > tl.load(threshold + which))
    if policy == _SEQUENTIAL:
        chosen = tl.cumsum(free.to(tl.int32), 0) <= count
    if policy == _ENTROPY_BOUNDED:
        before = ahead | (other == at[:, None])
        entropy = tl.sum(tl.where(before & free[None, :], -theirs, 0.0), 1)
        chosen = (entropy < tl.load(entropy_bound + which)) | (rank == 0)
    chosen = tl.where(taken + 1 >= allowed, free, chosen & free)

    place = which * length + tl.load(position + here, mask=real, other=0)
    drawn = tl.load(token + here, mask=chosen, other=0)
    tl.store(tokens_table + place, drawn, mask=chosen)
    tl.store(known_table + place, chosen.to(tl.uint8), mask=chosen)
    tl.store(step_table + place, tl.load(steps_taken + which) + 1 + tl.zeros_like(drawn), mask=chosen)
    tl.store(logprob_table + place, tl.load(logprob + here, mask=chosen, other=0.0), mask=chosen)
    tl.store(sampling_logprob_table + place, tl.load(sampling_logprob + here, mask=chosen, other=0.0), mask=chosen)
    tl.store(version_table + place, tl.load(weights) + tl.zeros_like(drawn), mask=chosen)
