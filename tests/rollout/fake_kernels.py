"""Stand-ins for kernel libraries: the documented interface, in plain torch, with the checks that the real ones make.

Each attends piece by piece, without a mask, to the first keys of the piece's pages; in any dtype, on any device.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor


def _int32(tensor: Tensor, *shape: int) -> Tensor:
    assert tensor.dtype == torch.int32 and tensor.shape == shape and tensor.is_contiguous()
    return tensor


def _attend(q: Tensor, bounds: list[int], keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """q: [T, heads, d]; keys, values: of each piece, [K, kv heads, d]."""
    assert bounds[0] == 0 and bounds[-1] == len(q) and len(bounds) == len(keys) + 1
    out = torch.full_like(q, float("nan"))
    for first, end, key, value in zip(bounds, bounds[1:], keys, values):
        assert end > first and len(key)
        shared_by = q.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared_by, 1), value.repeat_interleave(shared_by, 1)
        weights = (torch.einsum("qhd,khd->hqk", q[first:end], key) * scale).softmax(-1)
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, value)
    return out


def _from_pages(cache: Tensor, table: Tensor, lengths: list[int]) -> list[Tensor]:
    """cache: [pages, page size, kv heads, d]; table: int32 [c, P]."""
    size = cache.shape[1]
    return [cache[row[: -(-length // size)].long()].flatten(0, 1)[:length] for row, length in zip(table, lengths)]


def _check_cache(q: Tensor, *caches: Tensor) -> None:
    for cache in caches:
        assert cache.dim() == 4 and cache.stride(-1) == 1 and cache.dtype == q.dtype and cache.shape[3] == q.shape[2]
    assert q.stride(-1) == 1


def flash_attn_interface() -> types.ModuleType:
    """FlashAttention 3."""

    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        qv=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        page_table=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None,
        rotary_seqlens=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        assert not causal and k is None and v is None
        _check_cache(q, k_cache, v_cache)
        pieces = len(cu_seqlens_q) - 1
        lengths = _int32(cache_seqlens, pieces).tolist()
        table = _int32(page_table, pieces, page_table.shape[1])
        assert max(lengths) <= page_table.shape[1] * k_cache.shape[1]
        bounds = _int32(cu_seqlens_q, pieces + 1).tolist()
        assert max_seqlen_q == max(end - first for first, end in zip(bounds, bounds[1:]))
        keys, values = (_from_pages(cache, table, lengths) for cache in (k_cache, v_cache))
        return _attend(q, bounds, keys, values, softmax_scale)

    return _module("flash_attn_interface", flash_attn_with_kvcache=flash_attn_with_kvcache)


def flash_attn(page_multiple: int = 256) -> types.ModuleType:
    """FlashAttention 2."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert not causal and k.shape[1] % page_multiple == 0
        _check_cache(q, k, v)
        pieces = len(cu_seqlens_q) - 1
        ends = _int32(cu_seqlens_k, pieces + 1).tolist()
        lengths = [end - first for first, end in zip(ends, ends[1:])]
        bounds = _int32(cu_seqlens_q, pieces + 1).tolist()
        table = _int32(block_table, pieces, block_table.shape[1])
        assert max(lengths) <= max_seqlen_k <= block_table.shape[1] * k.shape[1] and ends[0] == 0
        assert max_seqlen_q == max(end - first for first, end in zip(bounds, bounds[1:]))
        keys, values = (_from_pages(cache, table, lengths) for cache in (k, v))
        return _attend(q, bounds, keys, values, softmax_scale)

    return _module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)


class BatchPrefillWithPagedKVCacheWrapper:
    """FlashInfer's."""

    made = 0

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False):
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout in ("NHD", "HND")
        self.kv_layout = kv_layout
        BatchPrefillWithPagedKVCacheWrapper.made += 1

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
    ):
        assert not causal and custom_mask is None
        pieces = len(qo_indptr) - 1
        self.bounds = _int32(qo_indptr, pieces + 1).tolist()
        begins = _int32(paged_kv_indptr, pieces + 1).tolist()
        last = _int32(paged_kv_last_page_len, pieces).tolist()
        pages = _int32(paged_kv_indices, begins[-1]).long()
        assert all(1 <= tokens <= page_size for tokens in last)
        self.pages = [pages[first:end] for first, end in zip(begins, begins[1:])]
        self.lengths = [(len(own) - 1) * page_size + tokens for own, tokens in zip(self.pages, last)]
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.dtypes, self.scale = (q_data_type, kv_data_type), sm_scale

    def run(self, q, paged_kv_cache):
        heads, kv_heads, dim, size = self.shape
        assert q.shape == (self.bounds[-1], heads, dim) and q.is_contiguous()
        assert (q.dtype, paged_kv_cache.dtype) == self.dtypes
        cache = paged_kv_cache.transpose(2, 3) if self.kv_layout == "HND" else paged_kv_cache
        assert cache.shape[1:] == (2, size, kv_heads, dim)
        read = lambda kind: [
            cache[own, kind].flatten(0, 1)[:length] for own, length in zip(self.pages, self.lengths, strict=True)
        ]
        return _attend(q, self.bounds, read(0), read(1), self.scale)


def flashinfer() -> types.ModuleType:
    return _module("flashinfer", BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper)


def _module(name: str, **members) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module
