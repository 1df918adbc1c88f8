"""Attention of a pass by gathering its pages: exact on every device, the oracle of the other backends.

Sequences with similar numbers of tokens and of keys share a call, so a long prompt among sequences that decode a block
each costs its own length only. The heads that share keys and values stand as further queries of these, so nothing is
repeated. Everything that does not depend on the layer (which lines are read and written, and the mask) is found once
per pass; a layer then gathers its queries, its pages and its outputs with one `index_select` each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dlm.model.buckets import by_length
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.kv_cache import BlockKVCache

_FEW_QUERIES, _FEW_KEYS = 16, 64  # sequences with up to so many share a call whatever their lengths


@dataclass(frozen=True, slots=True)
class Bucket:
    """m sequences that are attended to in one call, padded to Q tokens and K keys.

    Attributes:
        texts, longest: m, Q.
        pages: int64 [m, pages of K keys].
        token: int64 [m, Q], the query tokens; the last one of a shorter sequence is repeated.
        last_visible: int64 [m, Q], of these tokens.
    """

    texts: int
    longest: int
    pages: Tensor
    token: Tensor
    last_visible: Tensor

    def rows(self, heads: int) -> Tensor:
        """Lines of q [T * heads, d] by text, head and token. int64 [m * heads * Q]."""
        head = torch.arange(heads, device=self.token.device)[None, :, None]
        return (self.token[:, None] * heads + head).flatten()


class Buckets:
    """The sequences of a pass in buckets, and the way back from their outputs.

    Attributes:
        buckets: of all sequences.
    """

    def __init__(self, queries: Queries) -> None:
        count = np.array(queries.count)
        first = count.cumsum() - count
        back = np.empty((3, len(queries.position)), np.int64)
        before = 0  # lines of one head in the buckets so far
        self.buckets: list[Bucket] = []
        for alike in by_length(queries.count, floor=_FEW_QUERIES):
            for close in by_length([queries.key_length[index] for index in alike], floor=_FEW_KEYS):
                members = np.array([alike[index] for index in close])
                longest, keys = int(count[members].max()), max(queries.key_length[index] for index in members)
                offset = np.minimum(np.arange(longest), count[members, None] - 1)  # [m, Q]
                token = first[members, None] + offset
                begin = before + longest * np.arange(len(members))[:, None]
                back[:, token] = np.stack(np.broadcast_arrays(begin, longest, offset))
                before += longest * len(members)
                sent = torch.from_numpy(token).to(queries.device)
                pages = queries.pages[torch.from_numpy(members).to(queries.device), : -(-keys // queries.page_size)]
                self.buckets.append(Bucket(len(members), longest, pages, sent, queries.last_visible[sent]))
        self._back = torch.from_numpy(back).to(queries.device)

    def back(self, heads: int) -> Tensor:
        """Where the output of each token and head stands in the outputs [texts, heads, Q] of all buckets, one bucket
        after the other. int64 [T * heads].
        """
        begin, longest, offset = self._back[..., None]
        return (begin * heads + torch.arange(heads, device=begin.device) * longest + offset).flatten()


@dataclass(frozen=True, slots=True)
class _Call:
    """A bucket's part of a layer.

    Attributes:
        texts: m.
        rows: of q. places: of the pages.
        mask: what is added to the scores, [m, 1, queries of a kv head, K].
    """

    texts: int
    rows: Tensor
    places: Tensor
    mask: Tensor


class GatheredAttention:
    """row_params.Attention over the cache: store the keys and values of the pass, then read."""

    def __init__(self, cache: BlockKVCache, queries: Queries) -> None:
        self.cache, self.queries = cache, queries
        self.stored = Stored(cache, queries)
        self.buckets = Buckets(queries)
        self.calls: list[_Call] = []

    def _prepare(self, heads: int) -> None:
        self.calls = [self._call(bucket, heads) for bucket in self.buckets.buckets]
        self.back = self.buckets.back(heads)

    def _call(self, bucket: Bucket, heads: int) -> _Call:
        shape, sharing = self.cache.shape, heads // self.cache.shape.kv_heads
        keys = bucket.pages.shape[1] * shape.page_size
        hidden = torch.arange(keys, device=bucket.pages.device) >= bucket.last_visible[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=shape.dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, float("-inf"))[:, None].repeat(1, 1, sharing, 1)
        return _Call(bucket.texts, bucket.rows(heads), self.cache.places(bucket.pages), mask)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, dim = q.shape
        if not self.calls:
            self._prepare(heads)
        self.stored(layer, k, v)
        lines = q.reshape(-1, dim)
        outputs = [self._attend(layer, call, lines, scale) for call in self.calls]
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return together.index_select(0, self.back).view(tokens, 1, heads * dim)

    def _attend(self, layer: int, call: _Call, lines: Tensor, scale: float) -> Tensor:
        """[m * heads * Q, d]."""
        dim, texts = lines.shape[1], call.texts
        queries = lines.index_select(0, call.rows).view(texts * self.cache.shape.kv_heads, -1, dim)
        keys, values = self.cache.gather(layer, call.places, texts)
        split = lambda x: x.view(texts, self.cache.shape.kv_heads, -1, dim)
        out = F.scaled_dot_product_attention(
            split(queries), split(keys), split(values), attn_mask=call.mask, scale=scale
        )
        return out.reshape(-1, dim)


class Stored:
    """Writes the keys and values of a pass."""

    def __init__(self, cache: BlockKVCache, queries: Queries) -> None:
        self.cache, self.lines = cache, cache.lines(queries.destination)
        self.tokens = None if len(queries.write) == len(queries.position) else queries.write

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [T, 1, kv heads, d]."""
        if self.tokens is not None:
            k, v = k[self.tokens], v[self.tokens]
        self.cache.store(layer, self.lines, k[:, 0], v[:, 0])
