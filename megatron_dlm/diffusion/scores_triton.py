"""What the sampler's kernels (sampling_triton.py, filters_triton.py) know of the policy: the scores of some tokens.

Import it where it is used: it needs triton.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-87.0)  # exp of anything lower is no normal number in fp32, where a piece would be looked at
VARYING = ["size", "mask_id", "pieces"]  # arguments of kernels whose values are not compiled in
UNTEMPERED, MARGIN, ENTROPY = (tl.constexpr(kind) for kind in (1, 2, 3))  # of sampling.Confidence


@triton.jit
def scores(line, at, width, size, mask_id, temperature):
    """model/policy.py's `policy_scores` of some tokens of a row."""
    logit = tl.load(line + at, mask=at < width, other=0.0)
    return tl.where((at < size) & (at != mask_id), tl.div_rn(logit.to(tl.float32), temperature), float("-inf"))


@triton.jit
def is_filtered(greedy, top_k, top_p):
    """sampling.DrawRules' `filtered` of a row."""
    return ((top_k > 0) | (top_p < 1)) & (greedy == 0)
