"""Attention of a pass with FlashInfer, pages read in place.

Its prefill wrapper plans a pass on the host, once for all layers, and balances the work of pieces of any length
(attention/pieces.py). It compiles its kernels when they are first used, or takes them from its package of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.rollout.attention.optional import check_device, check_sizes, load
from megatron_dlm.rollout.attention.pieces import Pieces, ends
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.attention.sdpa import Stored
from megatron_dlm.rollout.kv_cache import BlockKVCache, CacheShape

_WORKSPACE = 256 * 2**20  # bytes, for the partial results of texts that it splits


def check(shape: CacheShape, device: torch.device) -> None:
    """Refuse what FlashInfer cannot do.

    Raises:
        ConfigError: device, dtype or head width. DependencyError: it is not installed.
    """
    check_device(device, "FlashInfer", (8, 0), None)
    check_sizes(shape, "FlashInfer", lambda dim: dim in (64, 128, 256), "64, 128 or 256")
    _load()


def _load():
    return load("flashinfer", "FlashInfer (package flashinfer-python)", "flashinfer")


class FlashInfer:
    """The backend of one engine: prepares the attention of a pass. Its wrapper and workspace serve all passes."""

    def __init__(self) -> None:
        self.wrapper = None

    def __call__(self, cache: BlockKVCache, queries: Queries) -> PlannedAttention:
        if self.wrapper is None:
            workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=cache.device)
            self.wrapper = _load().BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        return PlannedAttention(self.wrapper, cache, queries)


class PlannedAttention:
    """row_params.Attention over the cache: store the keys and values of the pass, then read them in place.

    The first layer plans, because it brings the number of heads and the scale; a wrapper remembers its last plan only,
    so a pass must be over before another one begins.
    """

    def __init__(self, wrapper, cache: BlockKVCache, queries: Queries) -> None:
        self.wrapper, self.cache, self.pieces = wrapper, cache, Pieces.of(queries)
        self.stored = Stored(cache, queries)
        self.planned: float | None = None  # the scale

    def _plan(self, heads: int, dtype: torch.dtype, scale: float) -> None:
        shape = self.cache.shape
        bounds, pages, last = self.pieces.page_list()
        self.wrapper.plan(
            torch.from_numpy(ends(self.pieces.count)).to(torch.int32),  # on the host, where it plans
            bounds,
            pages,
            last,
            heads,
            shape.kv_heads,
            shape.head_dim,
            shape.page_size,
            causal=False,
            sm_scale=scale,
            q_data_type=dtype,
            kv_data_type=shape.dtype,
        )
        self.planned = scale

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.planned != scale:
            self._plan(q.shape[2], q.dtype, scale)
        self.stored(layer, k, v)
        return self.wrapper.run(q[:, 0].contiguous(), self.cache.storage[layer - 1]).reshape(len(q), 1, -1)
