"""The block KV cache, and attention over it.

Each running sequence owns one slot: room for the keys and values of its whole text, in every layer. A forward pass writes the tokens that it is given and reads
everything up to the end of each query's block, so the same pass serves prompt blocks, a finished block whose final keys are not yet stored,
and the block that is being denoised, whose keys are overwritten at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    @staticmethod
    def bytes_per_slot(max_length: int, num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * max_length * kv_heads * head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Ragged:
    """A batch of n sequences, each with its own number of query tokens; T tokens in all.

    Attributes:
        slot: int64 [n], cache slot of each sequence.
        sequence: int64 [T], which of the n sequences a token belongs to.
        offset: int64 [T], its place among that sequence's query tokens.
        position: int64 [T], its position in the text.
        last_visible: int64 [T], one past the last position that it may see: the end of its block.
        longest: most query tokens of a sequence.
        key_length: one past the last position that anybody sees.
    """

    slot: Tensor
    sequence: Tensor
    offset: Tensor
    position: Tensor
    last_visible: Tensor
    longest: int
    key_length: int


class CachedAttention:
    """Attention of a ragged batch over the cache (row_params.Attention): write the batch's keys and values, then read.

    What is visible: every position before the end of the query's block. Later blocks of the same pass are excluded by that; what an earlier pass
    wrote beyond it is overwritten before it can be read.
    """

    def __init__(self, cache: BlockKVCache, batch: Ragged) -> None:
        self.cache = cache
        self.batch = batch
        n = len(batch.slot)
        device = batch.slot.device
        bound = torch.ones(
            n, batch.longest, dtype=torch.int64, device=device
        )  # places without a query see key 0, so that softmax is finite
        bound[batch.sequence, batch.offset] = batch.last_visible
        self.mask = (torch.arange(batch.key_length, device=device) < bound[:, :, None])[:, None]  # [n, 1, Q, K]
        self.token_slot = batch.slot[batch.sequence]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, (tokens, _, heads, dim) = self.batch, q.shape
        keys, values = self.cache.storage[layer - 1]
        keys[self.token_slot, batch.position] = k[:, 0]
        values[self.token_slot, batch.position] = v[:, 0]
        queries = q.new_zeros(len(batch.slot), batch.longest, heads, dim)
        queries[batch.sequence, batch.offset] = q[:, 0]
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys[batch.slot, : batch.key_length].transpose(1, 2),
            values[batch.slot, : batch.key_length].transpose(1, 2),
            attn_mask=self.mask,
            scale=scale,
            enable_gqa=heads != k.shape[2],
        )  # [n, heads, Q, d]
        return out.transpose(1, 2)[batch.sequence, batch.offset].reshape(tokens, 1, heads * dim)
