"""The tokens of a pass, and what they may see.

A pass computes a span of each of n sequences. What a token sees is given by one number, because everything before the
end of its block is visible to it: the finished blocks in their final form, and its own block as it stands now. What an
earlier pass stored beyond that is overwritten before it can be read.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.rollout.plan import Span


@dataclass(frozen=True, slots=True)
class Queries:
    """The T tokens of n sequences, one sequence after the other.

    Attributes:
        pages: int64 [n, P], the page table of each sequence.
        page_size: tokens per page.
        count: the n numbers of tokens, each at least 1.
        key_length: per sequence, one past the last position that any of its tokens sees, or more.
        sequence: int64 [T], which of the n sequences a token belongs to.
        position: int64 [T], its position in the text.
        last_visible: int64 [T], one past the last position that it sees.
        write: int64 [W], the tokens whose keys and values are stored; destination: int64 [W], the lines of the cache
            (page x page size + offset) where they go.
        seen: int64 [T], `last_visible` on the host; None if all tokens of a span see the same, and the host need not
            know how much that is.
    """

    pages: Tensor
    page_size: int
    count: list[int]
    key_length: list[int]
    sequence: Tensor
    position: Tensor
    last_visible: Tensor
    write: Tensor
    destination: Tensor
    seen: np.ndarray | None = None

    @property
    def device(self) -> torch.device:
        return self.pages.device

    @classmethod
    def of(
        cls,
        spans: Ordered[Span],
        block_sizes: Ordered[int] | None,
        page_table: Tensor,
        slot: Tensor,
        page_size: int,
    ) -> Queries:
        """The queries of some spans.

        Args:
            block_sizes: attention block of each sequence; None for full attention, where a token sees all of its span.
            page_table: int64 [S, P] of all slots. slot: int64 [n], those of the spans.
        """
        device = page_table.device
        first, end = (np.array([getattr(span, name) for span in spans]) for name in ("first", "end"))
        write_from = np.array([span.write_from for span in spans])
        count = end - first
        sequence = np.repeat(np.arange(len(spans)), count)
        position = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + first[sequence]
        if block_sizes is None:
            last_visible = end[sequence]
        else:
            block = np.asarray(block_sizes)[sequence]
            last_visible = (position // block + 1) * block
        write = np.flatnonzero(position >= write_from[sequence])
        send = lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device)
        pages, sequence_, position_, write_ = page_table[slot], send(sequence), send(position), send(write)
        place = position_[write_]
        destination = pages[sequence_[write_], place // page_size] * page_size + place % page_size
        return cls(
            pages=pages,
            page_size=page_size,
            count=count.tolist(),
            key_length=end.tolist(),
            sequence=sequence_,
            position=position_,
            last_visible=send(last_visible),
            write=write_,
            destination=destination,
            seen=last_visible,
        )
