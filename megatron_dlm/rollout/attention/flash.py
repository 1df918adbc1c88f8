"""Attention of a pass with FlashAttention, pages read in place.

FlashAttention 3 (module flash_attn_interface) takes pages of any size; it has kernels for Ampere, Ada and Hopper.
FlashAttention 2 (package flash_attn) takes pages of a multiple of 256 tokens. Neither knows a mask that is open to the
end of a block, and none is needed (attention/pieces.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.rollout.attention.optional import FLAG, check_device, check_sizes, load
from megatron_dlm.rollout.attention.pieces import Pieces
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.attention.sdpa import Stored
from megatron_dlm.rollout.kv_cache import BlockKVCache, CacheShape

_PAGE_OF_2 = 256
_MODULE_3, _MODULE_2 = "flash_attn_interface", "flash_attn"


def check_3(shape: CacheShape, device: torch.device) -> None:
    """Refuse what FlashAttention 3 cannot do.

    Raises:
        ConfigError: device, dtype or head width. DependencyError: it is not installed.
    """
    check_device(device, "FlashAttention 3", (8, 0), (10, 0))
    _check_sizes(shape, "FlashAttention 3")
    load(_MODULE_3, "FlashAttention 3", "flash")


def check_2(shape: CacheShape, device: torch.device) -> None:
    """Refuse what FlashAttention 2 cannot do: as for version 3, and small pages."""
    check_device(device, "FlashAttention 2", (8, 0), None)
    _check_sizes(shape, "FlashAttention 2")
    load(_MODULE_2, "FlashAttention 3, or FlashAttention 2 and pages of 256 tokens", "flash")
    if shape.page_size % _PAGE_OF_2:
        raise ConfigError(
            f"FlashAttention 2 reads pages of a multiple of {_PAGE_OF_2} tokens, and --kv-page-size is "
            f"{shape.page_size}. Set it to {_PAGE_OF_2}, install FlashAttention 3, or use {FLAG} auto."
        )


def _check_sizes(shape: CacheShape, library: str) -> None:
    check_sizes(shape, library, lambda dim: dim % 8 == 0 and dim <= 256, "a multiple of 8 up to 256")


class _Flash(ABC):
    """row_params.Attention over the cache: store the keys and values of the pass, then read them in place."""

    def __init__(self, cache: BlockKVCache, queries: Queries) -> None:
        self.cache, self.pieces = cache, Pieces.of(queries)
        self.stored = Stored(cache, queries)
        self.page_table = self.pieces.page_table()
        self.query_ends = self.pieces.query_ends()
        self.key_length = self.pieces.key_length.to(torch.int32)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.stored(layer, k, v)
        return self._read(q[:, 0], *self.cache.paged(layer), scale).reshape(len(q), 1, -1)

    @abstractmethod
    def _read(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """[T, heads, d]. q: the same; keys, values: [pages, page size, kv heads, d]."""


class Flash3(_Flash):
    """With FlashAttention 3."""

    def _read(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        # Of its functions this one reads pages. Without new keys it is an ordinary forward pass.
        return load(_MODULE_3, "FlashAttention 3", "flash").flash_attn_with_kvcache(
            q,
            keys,
            values,
            cache_seqlens=self.key_length,
            page_table=self.page_table,
            cu_seqlens_q=self.query_ends,
            max_seqlen_q=self.pieces.longest,
            softmax_scale=scale,
            causal=False,
        )


class Flash2(_Flash):
    """With FlashAttention 2."""

    def __init__(self, cache: BlockKVCache, queries: Queries) -> None:
        super().__init__(cache, queries)
        # With a page table, only the differences of these are looked at.
        self.key_ends = F.pad(self.pieces.key_length.cumsum(0), (1, 0)).to(torch.int32)

    def _read(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        return load(_MODULE_2, "FlashAttention 2", "flash").flash_attn_varlen_func(
            q,
            keys,
            values,
            cu_seqlens_q=self.query_ends,
            cu_seqlens_k=self.key_ends,
            max_seqlen_q=self.pieces.longest,
            max_seqlen_k=self.pieces.most_keys,
            softmax_scale=scale,
            causal=False,
            block_table=self.page_table,
        )
