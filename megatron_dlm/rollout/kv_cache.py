"""The memory of the block KV cache: pages of keys and values, in every layer.

Who holds which page is decided by the scheduler (scheduler.py, pages.py); here is only the storage. It is given back
between rollouts (`sleep`) and taken again when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dlm.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of this rank's part of the model: `layers` x pages x (key, value) x `kv_heads` x `page_size` x `head_dim`."""

    layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return self.layers * 2 * self.page_size * self.kv_heads * self.head_dim * self.dtype.itemsize


def num_pages(shape: CacheShape, sequences: int, longest: int, limit_bytes: int | None) -> int:
    """How many pages a cache gets: enough for `sequences` texts of `longest` tokens, each with one page of its own
    besides those that it shares; fewer if the limit is lower.

    Raises:
        ConfigError: the limit is too low for one such text.
    """
    one = -(-longest // shape.page_size) + 1
    wanted = sequences * one
    if limit_bytes is None:
        return wanted
    allowed = limit_bytes // shape.page_bytes
    if allowed < one:
        raise ConfigError(
            f"A KV cache of {limit_bytes:,} bytes is too small: one text of {longest} tokens needs "
            f"{one * shape.page_bytes:,}. Give it more memory with --kv-cache-gib or --kv-cache-memory-fraction, or "
            "allow shorter prompts and responses."
        )
    return min(wanted, allowed)


class BlockKVCache:
    """Keys and values in pages, and one page more (`scratch`), which is written and never read.

    Attributes:
        storage: [layers, pages + 1, 2 (key, value), kv heads, page_size, head dim]; empty while asleep. The tokens of a
            head lie together, so a gather of pages (`gather`) copies long runs and gives, without another copy, what a
            batched product of each head wants.
    """

    def __init__(self, shape: CacheShape, pages: int, device: torch.device) -> None:
        self.shape, self.pages, self.device = shape, pages, device
        self.sleep()

    # Memory ---------------------------------------------------------------------------------------------------------

    @property
    def scratch(self) -> int:
        return self.pages

    @property
    def asleep(self) -> bool:
        return self.storage.numel() == 0

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def sleep(self) -> None:
        """Give the memory back; what was stored is lost."""
        self.storage = torch.empty(0, dtype=self.shape.dtype, device=self.device)

    def wake(self) -> None:
        """Take the memory. Does nothing when awake."""
        if self.asleep:
            shape = self.shape
            size = (shape.layers, self.pages + 1, 2, shape.kv_heads, shape.page_size, shape.head_dim)
            # Zeros: what stands beyond a text's end is masked, but still multiplied, and 0 x NaN would be NaN.
            self.storage = torch.zeros(size, dtype=shape.dtype, device=self.device)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, (source, destination), in all layers; every source is read before any destination is written."""
        if pairs:
            source, destination = torch.tensor(pairs, device=self.device).T
            self.storage[:, destination] = self.storage[:, source]

    # Writing and reading --------------------------------------------------------------------------------------------

    def lines(self, destination: Tensor) -> Tensor:
        """Where the keys and values of tokens go, for `store`. The same in every layer.

        Args:
            destination: int64 [W], page x page size + offset.

        Returns: int64 [2, W * kv heads].
        """
        heads, size = self.shape.kv_heads, self.shape.page_size
        page, offset = destination // size, destination % size
        head = torch.arange(heads, device=self.device)
        key = ((2 * page[:, None] * heads + head) * size + offset[:, None]).flatten()
        return torch.stack([key, key + heads * size])

    def store(self, layer: int, lines: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values [W, kv heads, head dim] of a layer (from 1) to their `lines`."""
        memory = self.storage[layer - 1].view(-1, self.shape.head_dim)
        memory.index_copy_(0, lines[0], k.reshape(-1, self.shape.head_dim))
        memory.index_copy_(0, lines[1], v.reshape(-1, self.shape.head_dim))

    def places(self, pages: Tensor) -> Tensor:
        """Where the keys and values of texts are, for `gather`. The same in every layer.

        Args:
            pages: int64 [m, P].

        Returns: int64 [2 * m * kv heads * P].
        """
        heads = self.shape.kv_heads
        ahead = lambda count: torch.arange(count, device=self.device)
        page, kind, head = pages[None, :, None, :], ahead(2)[:, None, None, None], ahead(heads)[None, None, :, None]
        return ((2 * page + kind) * heads + head).flatten()

    def gather(self, layer: int, places: Tensor, texts: int) -> tuple[Tensor, Tensor]:
        """Keys and values of m texts in a layer (from 1), each [m * kv heads, P * page size, head dim]."""
        shape = self.shape
        runs = self.storage[layer - 1].view(-1, shape.page_size * shape.head_dim)
        keys, values = runs.index_select(0, places).view(2, texts * shape.kv_heads, -1, shape.head_dim)
        return keys, values

    def paged(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer (from 1) in place, each [pages, page size, kv heads, head dim]."""
        keys, values = self.storage[layer - 1].transpose(2, 3).unbind(1)
        return keys, values
