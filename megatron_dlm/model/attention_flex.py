"""Attention of a whole packed row with FlexAttention, which torch compiles for the GPU.

Nothing is cut into groups or padded to their longest: the kernel gets the row as it is, the tables of tiles that
see each other (tiles.py), and the visibility rule for the tiles that do so in part. Keys and values are not repeated
for the heads that share them, and no [T, T] mask is made.

It is compiled once: lengths of rows are whole tiles (diffusion/planner.py; others are filled up) and marked as
changing, and everything that says who sees whom is a tensor. Another width or number of heads, another dtype, or a pass
without gradients is compiled anew.

FlexAttention has no backward pass on a CPU, and its forward pass there reads the rule alone. So on a CPU the mask is
written out from the tables and the rule, and torch's own attention runs under it: exact, with [T, T] numbers, for
tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.diffusion.layout import Layout, sees
from megatron_dlm.diffusion.planner import FLEX_TILE as TILE
from megatron_dlm.model.attention import masked_attention
from megatron_dlm.model.tiles import Tables

_FEWEST = 2  # tiles; torch takes a length of one for a constant
_VARIANTS = 64  # most kernels in a process, of heads, widths, types, and with or without gradients
_OPTIONS = {"cuda": {"IS_DIVISIBLE": True}}
"""Lengths are whole tiles. torch's forward kernel (2.9 to 2.11) does not see that of lengths that change, and would
check and mask all it reads. torch documents no such option, and sets it itself where nobody does. Not measured.
"""


class FlexAttention:
    """row_params.Attention of a row.

    Padding slots get zeros.

    Args:
        layout: of the queries [T].
        keys: layout of the keys [K]; None where they are those of the same tokens.
    """

    def __init__(self, layout: Layout, keys: Layout | None = None) -> None:
        asking = _whole_tiles(layout)
        seen = asking if keys is None else _whole_tiles(keys)
        self.tables = Tables.of(asking, seen, TILE)
        self.columns = _columns(asking), _columns(seen)
        self.arguments = [*(one[None, None] for one in self.tables.tensors()), *self.columns]
        self.mask: Tensor | None = None  # written out, on a CPU

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, dim = q.shape
        lengths = [columns.shape[1] for columns in self.columns]
        q, k, v = (_by_head(x, length) for x, length in zip((q, k, v), (lengths[0], lengths[1], lengths[1])))
        out = self._on_gpu(q, k, v, scale) if q.device.type == "cuda" else self._on_cpu(q, k, v, scale)
        return out[0, :, :tokens].transpose(0, 1).reshape(tokens, 1, heads * dim)

    def _on_gpu(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        usual = q.shape[-1] ** -0.5
        if abs(scale - usual) > 1e-6 * usual:  # a number that is no constant would be compiled for
            q = q * (scale / usual)
        return compiled()(*_changing(q, k, v, *self.arguments))

    def _on_cpu(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.mask is None:
            self.mask = written_out(self.tables, *self.columns)
        blind = ~self.mask.any(1)  # what sees nothing sees everything, so that its softmax is finite, and gets zeros
        out = masked_attention(q, k, v, (self.mask | blind[:, None])[None, None], scale)
        out = out.masked_fill(blind[:, None], 0.0)
        return out.unflatten(2, (q.shape[1], -1)).transpose(1, 2)


@once
def compiled() -> Callable[..., Tensor]:
    """`attend`, compiled."""
    import torch._dynamo.config as settings

    # Policy, value model and teachers in one process, with and without gradients, are more shapes than torch compiles
    # one function for by default; behind its limit `fullgraph` is an error.
    settings.recompile_limit = max(settings.recompile_limit, _VARIANTS)
    return torch.compile(attend, fullgraph=True)


def attend(q: Tensor, k: Tensor, v: Tensor, *tables_and_columns: Tensor) -> Tensor:
    """What is compiled; with tensors alone as arguments, because a change of anything else would be compiled anew.

    Args:
        q: [1, heads, T, d]. k, v: [1, kv heads, K, d]. T and K are multiples of TILE.
        tables_and_columns: `Tables.tensors()`, each as [1, 1, ...], and who the queries [4, T] and the keys [4, K] are.

    Returns: [1, heads, T, d].
    """
    from torch.nn.attention.flex_attention import flex_attention

    # Known to be whole tiles, the lengths need no checks in the kernel.
    torch._check(v.shape[2] == k.shape[2])
    torch._check(q.shape[2] % TILE == 0)
    torch._check(k.shape[2] % TILE == 0)
    *tables, asking, seen = tables_and_columns
    mask, shared = block_mask(tables, asking, seen), q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=shared, kernel_options=_OPTIONS.get(q.device.type))


def block_mask(tables: list[Tensor], asking: Tensor, seen: Tensor):
    """FlexAttention's mask of tables [1, 1, N], [1, 1, N, M], ... and columns [4, T], [4, K]."""
    from torch.nn.attention.flex_attention import BlockMask

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(*(asking[n, query] for n in range(4)), *(seen[n, key] for n in range(4)))

    keys, key, full_keys, full_key, queries, query, full_queries, full_query = tables
    return BlockMask(
        seq_lengths=(asking.shape[1], seen.shape[1]),
        kv_num_blocks=keys,
        kv_indices=key,
        full_kv_num_blocks=full_keys,
        full_kv_indices=full_key,
        q_num_blocks=queries,
        q_indices=query,
        full_q_num_blocks=full_queries,
        full_q_indices=full_query,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=rule,
    )


def written_out(tables: Tables, asking: Tensor, seen: Tensor) -> Tensor:
    """The mask that a kernel applies which reads the tables of keys, bool [T, K]."""
    rule = sees(*asking[:, :, None], *seen[:, None])
    partial, full = (
        _tiles(count, which).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        for count, which in ((tables.keys, tables.key), (tables.full_keys, tables.full_key))
    )
    return full | partial & rule


def _tiles(count: Tensor, which: Tensor) -> Tensor:
    """int32 [N], [N, M] -> bool [N, M]."""
    listed = torch.arange(which.shape[1], device=which.device) < count[:, None]
    return torch.zeros_like(listed).scatter_(1, which.long(), listed)


def _whole_tiles(layout: Layout) -> Layout:
    tiles = -(-len(layout.group) // TILE)
    return layout.padded(max(tiles, _FEWEST) * TILE)


def _columns(layout: Layout) -> Tensor:
    """What the rule reads, int32 [4, T]."""
    return torch.stack([layout.group, layout.response, layout.view, layout.block]).to(torch.int32)


def _by_head(x: Tensor, length: int) -> Tensor:
    """[T, 1, heads, d] -> [1, heads, length, d], zeros behind the row."""
    if len(x) < length:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, length - len(x)))
    return x.contiguous().permute(1, 2, 0, 3)  # in one form always, because another would be compiled anew


def _changing(q: Tensor, k: Tensor, v: Tensor, *tables_and_columns: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, with marks at the dimensions that grow with the row."""
    for one in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(one, 2)
    *tables, asking, seen = tables_and_columns
    for one in tables:
        torch._dynamo.maybe_mark_dynamic(one, tuple(range(2, one.dim())))
    for one in (asking, seen):
        torch._dynamo.maybe_mark_dynamic(one, 1)
    return q, k, v, *tables_and_columns
