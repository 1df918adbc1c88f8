"""The block KV cache, and attention over it.

Each running sequence owns one slot: room for the keys and values of its whole text, in every layer. A forward pass
writes the tokens that it is given and reads everything up to the end of each query's block, so the same pass serves
prompt blocks, a finished block whose final keys are not yet stored, and the block that is being denoised, whose keys
are overwritten at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.model.attention import masked_attention
from megatron_dlm.model.buckets import by_length

_FEW_QUERIES, _FEW_KEYS = 32, 256  # sequences with up to so many share a call whatever their lengths


class BlockKVCache:
    """Keys and values of running sequences.

    Args:
        num_slots: sequences that fit at once.
        max_length: tokens per sequence.
        num_layers, kv_heads, head_dim: of this rank's part of the model.
    """

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (num_layers, 2, num_slots, max_length, kv_heads, head_dim)
        # Zeros, because a slot beyond a sequence's end is masked but still multiplied, and 0 x NaN would be NaN.
        self.storage = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def max_length(self) -> int:
        return self.storage.shape[3]


@dataclass(frozen=True, slots=True)
class Ragged:
    """A batch of n sequences, each with its own number of query tokens, one sequence after the other; T tokens in all.

    Attributes:
        slot: int64 [n], cache slot of each sequence.
        count: the n numbers of query tokens, each at least 1.
        sequence: int64 [T], which of the n sequences a token belongs to.
        position: int64 [T], its position in the text.
        last_visible: int64 [T], one past the last position that it may see: the end of its block.
        key_length: per sequence, one past the last position that any of its tokens sees.
    """

    slot: Tensor
    count: list[int]
    sequence: Tensor
    position: Tensor
    last_visible: Tensor
    key_length: list[int]


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Sequences that are attended to in one call: m of them, padded to Q queries and K keys.

    Attributes:
        slot: int64 [m].
        key_length: K.
        token: int64 [m, Q], the query tokens; the last one of a shorter sequence is repeated.
        mask: bool [m, 1, Q, K].
        line, place: int64 [t], lines of the flattened [m * Q] output that are no repetition, and their tokens.
    """

    slot: Tensor
    key_length: int
    token: Tensor
    mask: Tensor
    line: Tensor
    place: Tensor


class CachedAttention:
    """Attention of a ragged batch over the cache (row_params.Attention): write the batch's keys and values, then read.

    What is visible: every position before the end of the query's block. Later blocks of the same pass are excluded by
    that; what an earlier pass wrote beyond it is overwritten before it can be read.

    Sequences with similar numbers of queries and of keys share a call, so a long prompt among sequences that decode a
    block each costs its own length only.
    """

    def __init__(self, cache: BlockKVCache, batch: Ragged) -> None:
        self.cache = cache
        self.batch = batch
        self.token_slot = batch.slot[batch.sequence]
        self.buckets = [
            self._bucket([members[index] for index in close])
            for members in by_length(batch.count, floor=_FEW_QUERIES)
            for close in by_length([batch.key_length[index] for index in members], floor=_FEW_KEYS)
        ]

    def _bucket(self, members: list[int]) -> _Bucket:
        batch, device = self.batch, self.batch.slot.device
        member = torch.tensor(members, device=device)
        count = torch.tensor(batch.count, device=device)
        first = (count.cumsum(0) - count)[member, None]
        queries = max(batch.count[index] for index in members)
        offset = torch.arange(queries, device=device)
        token = first + torch.minimum(offset, count[member, None] - 1)
        key_length = max(batch.key_length[index] for index in members)
        mask = torch.arange(key_length, device=device) < batch.last_visible[token][:, :, None]
        line = torch.nonzero((offset < count[member, None]).flatten())[:, 0]
        return _Bucket(batch.slot[member], key_length, token, mask[:, None], line, token.flatten()[line])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, dim = q.shape
        keys, values = self.cache.storage[layer - 1]
        keys[self.token_slot, self.batch.position] = k[:, 0]
        values[self.token_slot, self.batch.position] = v[:, 0]
        result = q.new_empty(tokens, heads * dim)
        for bucket in self.buckets:
            out = masked_attention(
                q[:, 0][bucket.token].transpose(1, 2),
                keys[bucket.slot, : bucket.key_length].transpose(1, 2),
                values[bucket.slot, : bucket.key_length].transpose(1, 2),
                bucket.mask,
                scale,
            )
            result[bucket.place] = out.flatten(0, 1)[bucket.line]
        return result[:, None]
