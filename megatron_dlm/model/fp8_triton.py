"""Rounding of activations to FP8, as one kernel: what model/fp8.py's `quantise_rows` does in half a dozen passes.

A pass of the engine rounds the input of every linear layer. With few tokens it is the launches that cost, and with many
the passes over memory. Here a program has one token; it goes over its numbers twice, the second time from the cache.

Import it where it is used: it needs triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # numbers that a program holds at a time
_LARGEST, _OF_NOTHING = tl.constexpr(448.0), tl.constexpr(1e-30)  # as in model/fp8.py


def quantise_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """[R, K] -> e4m3 [R, K] and scales, fp32 [R, 1]: about data * scale."""
    wide = wide.contiguous()
    rows, columns = wide.shape
    data = torch.empty_like(wide, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=wide.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _round[(rows,)](wide, data, scale, columns, BLOCK=block, num_warps=8 if block > 1024 else 4)
    return data, scale


@triton.jit
def _round(wide, data, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    most = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        some = tl.load(wide + start + place, mask=place < columns, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(some))
    size = tl.div_rn(tl.maximum(tl.max(most, 0), _OF_NOTHING), _LARGEST)
    tl.store(scale + row, size)
    for first in range(0, columns, BLOCK):
        place = first + tl.arange(0, BLOCK)
        here = place < columns
        some = tl.load(wide + start + place, mask=here, other=0.0).to(tl.float32)
        tl.store(data + start + place, tl.div_rn(some, tl.broadcast_to(size, (BLOCK,))).to(tl.float8e4nv), mask=here)
