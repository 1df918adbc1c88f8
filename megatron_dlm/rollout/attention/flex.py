"""Attention of a pass with FlexAttention, which torch compiles for the device.

Sequences share calls as in attention/sdpa.py. A block mask says which keys a tile of queries sees: most tiles of keys
are seen by all of them or by none, and only those at the end of a block are masked element by element. Pages of a
multiple of 128 tokens are such tiles themselves and are read in place; smaller ones are gathered first.

On a CPU the mask is applied by torch's reference implementation, which computes every score: exact, and slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from functools import partial

import torch
from torch import Tensor

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.rollout.attention.optional import FLAG
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.attention.sdpa import Bucket, Buckets, Stored
from megatron_dlm.rollout.kv_cache import BlockKVCache, CacheShape

TILE = 128  # queries, and keys, per tile of a mask
_NARROWEST = 16  # head that torch compiles a kernel for
_VARIANTS = 64  # most kernels in a process: of heads and types, and for one tile, page or text as for several

_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""For one text on a rank with one kv head, torch (2.11) would take its kernel for decoding, which keeps the queries of
all heads that share keys in one tile: where these are more than a tile of the mask there is none, and it raises.
"""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def check(shape: CacheShape, device: torch.device) -> None:
    """Refuse what FlexAttention cannot do.

    Raises:
        ConfigError: float64, or narrow heads, on a GPU.
    """
    if device.type == "cuda" and shape.dtype == torch.float64:
        raise ConfigError(f"FlexAttention does not compute in float64 on a GPU. Leave out --fp64, or use {FLAG} sdpa.")
    if device.type == "cuda" and shape.head_dim < _NARROWEST:
        raise ConfigError(
            f"FlexAttention has no kernels for heads of {shape.head_dim}; they must be {_NARROWEST} wide or wider. Use "
            f"{FLAG} sdpa."
        )


class FlexAttention:
    """row_params.Attention over the cache: store the keys and values of the pass, then read."""

    def __init__(self, cache: BlockKVCache, queries: Queries) -> None:
        self.cache, self.stored, self.buckets = cache, Stored(cache, queries), Buckets(queries)
        self.in_place = cache.shape.page_size % TILE == 0
        self.calls: list[tuple[int, Tensor, Tensor, object]] = []

    def _prepare(self, heads: int) -> None:
        self.back = self.buckets.back(heads)
        for bucket in self.buckets.buckets:
            places = self.cache.places(bucket.pages)
            prepare = self._mask_in_place if self.in_place else self._mask_of_gathered
            self.calls.append((bucket.texts, bucket.rows(heads), places, prepare(bucket, places, heads)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, dim = q.shape
        if not self.calls:
            self._prepare(heads)
        self.stored(layer, k, v)
        lines = q.reshape(-1, dim)
        outputs = []
        for texts, rows, places, mask in self.calls:
            # One row per text and kv head; the heads that share it are the heads of the row.
            queries = lines.index_select(0, rows).view(texts * self.cache.shape.kv_heads, -1, mask.seq_lengths[0], dim)
            keys, values = self._in_place(layer) if self.in_place else self.cache.gather(layer, places, texts)
            out = _kernel(q.device.type)(
                queries, keys[:, None], values[:, None], block_mask=mask, scale=scale, enable_gqa=True
            )
            outputs.append(out.reshape(-1, dim))
        return torch.cat(outputs).index_select(0, self.back).view(tokens, 1, heads * dim)

    # Gathered pages -------------------------------------------------------------------------------------------------

    def _mask_of_gathered(self, bucket: Bucket, places: Tensor, heads: int):
        """Keys of a row are those of its text, in order."""
        kv_heads, keys = self.cache.shape.kv_heads, bucket.pages.shape[1] * self.cache.shape.page_size
        seen = bucket.last_visible

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key < seen[row // kv_heads, query]

        tiles = torch.arange(-(-keys // TILE), device=seen.device).expand(bucket.texts * kv_heads, -1)
        return _block_mask(seen.repeat_interleave(kv_heads, 0), tiles, TILE, keys, visible)

    # Pages in place -------------------------------------------------------------------------------------------------

    def _in_place(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as one row of tiles, [1, lines, d]. A page is, for each kv head, a tile of keys;
        as far behind it as a page's keys are long is the tile of its values.
        """
        memory = self.cache.storage[layer - 1].view(1, -1, self.cache.shape.head_dim)
        apart = self.cache.shape.kv_heads * self.cache.shape.page_size
        return memory[:, :-apart], memory[:, apart:]

    def _mask_in_place(self, bucket: Bucket, places: Tensor, heads: int):
        """Keys of a row are tiles of the cache, here and there."""
        shape, seen = self.cache.shape, bucket.last_visible
        kv_heads, size = shape.kv_heads, shape.page_size
        used = bucket.pages.shape[1]
        pages = self.cache.storage.shape[1]
        place_of_page = torch.full((bucket.texts, pages), -1, dtype=torch.int32, device=seen.device)
        # What a page table holds beyond a short text means nothing; it is turned into its first entry, said again.
        own = torch.arange(used, device=seen.device) * size < seen.amax(1, keepdim=True)
        page = torch.where(own, bucket.pages, bucket.pages[:, :1])
        place = torch.where(own, torch.arange(used, device=seen.device), 0)
        place_of_page.scatter_(1, page, place.to(torch.int32))

        def visible(row: Tensor, head: Tensor, query: Tensor, line: Tensor) -> Tensor:
            tile, text = line // size, row // kv_heads
            place = place_of_page[text, tile // (2 * kv_heads)]
            own = (tile % (2 * kv_heads) == row % kv_heads) & (place >= 0)
            return own & (place * size + line % size < seen[text, query])

        tiles = places.view(2, bucket.texts * kv_heads, used)[0]
        lines = (2 * pages - 1) * kv_heads * size
        return _block_mask(seen.repeat_interleave(kv_heads, 0), tiles, size, lines, visible)


def _block_mask(seen: Tensor, tiles: Tensor, size: int, keys: int, visible: MaskMod):
    """The block mask of rows whose queries see a prefix each.

    Args:
        seen: int64 [n, Q], keys that a query sees.
        tiles: int64 [n, K], the tile in which the next `size` keys of a row are.
        keys: of all tiles. visible: the same rule for single keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, queries = seen.shape
    whole = -(-queries // TILE) * TILE
    padded = torch.cat([seen, seen[:, -1:].expand(-1, whole - queries)], dim=1).view(rows, -1, TILE)
    full = padded.amin(-1) // size  # tiles of keys that all of a tile's queries see; [n, tiles of queries]
    partial = -(-padded.amax(-1) // size) - full
    order = torch.arange(tiles.shape[1], device=seen.device)
    listed = tiles[:, None].expand(-1, full.shape[1], -1)
    rest = listed.gather(2, (full[..., None] + order).clamp(max=len(order) - 1))
    narrow = lambda x: x[:, None].to(torch.int32).contiguous()
    return BlockMask.from_kv_blocks(
        narrow(partial),
        narrow(rest),
        narrow(full),
        narrow(listed),
        BLOCK_SIZE=(TILE, size),
        mask_mod=visible,
        seq_lengths=(queries, keys),
        compute_q_blocks=False,
    )


@once
def _kernel(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as torch_flex

    if device == "cuda":
        import torch._dynamo.config as settings

        # Beyond torch's limit it would silently run uncompiled and write out every score, also of all other texts where
        # pages are read in place. With `fullgraph` that is an error.
        settings.recompile_limit = max(settings.recompile_limit, _VARIANTS)
        compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True)
        return partial(compiled, kernel_options=_OPTIONS)

    def reference(*args, **kwargs) -> Tensor:
        # Without this, torch traces the call anew each time, which takes a hundred times longer than to compute it.
        switch = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
        before = getattr(torch_flex, switch, False)
        setattr(torch_flex, switch, True)
        try:
            return torch_flex.flex_attention(*args, **kwargs)
        finally:
            setattr(torch_flex, switch, before)

    return reference
