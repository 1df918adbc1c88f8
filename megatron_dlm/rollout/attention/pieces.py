"""A pass for kernels that know no mask.

All tokens of a block see the same keys: everything before the end of the block. Cut at its block ends, a span becomes
pieces that each see all of a prefix of their text. To a kernel with a page table per sequence they are sequences of
their own that happen to share pages, and nothing is to be masked. So a finished block that is committed together with
the next one is two pieces, a prompt is one piece per block, and under full attention a span is one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.rollout.attention.queries import Queries


@dataclass(frozen=True, slots=True)
class Pieces:
    """c pieces, in the order of their tokens. The host need not know how many keys they see.

    Attributes:
        count: int64 [c], tokens of a piece, on the host.
        owner: int64 [c], which sequence of the pass a piece belongs to, on the host.
        key_length: int64 [c], keys that each token of a piece sees, on the device.
    """

    count: np.ndarray
    owner: np.ndarray
    key_length: Tensor
    queries: Queries

    @classmethod
    def of(cls, queries: Queries) -> Pieces:
        count, owner = np.array(queries.count), np.arange(len(queries.count))
        begin = count.cumsum() - count
        if queries.seen is not None:
            sequence, seen = np.repeat(owner, count), queries.seen
            begins = np.ones(len(seen), bool)
            begins[1:] = (sequence[1:] != sequence[:-1]) | (seen[1:] != seen[:-1])
            begin = np.flatnonzero(begins)
            count, owner = np.diff(begin, append=len(seen)), sequence[begin]
        return cls(count, owner, queries.last_visible[_send(begin, queries)], queries)

    @property
    def longest(self) -> int:
        """Most tokens of a piece."""
        return int(self.count.max())

    @property
    def most_keys(self) -> int:
        """As many keys as any piece sees, or more."""
        return max(self.queries.key_length)

    def query_ends(self) -> Tensor:
        """int32 [c + 1], on the device: 0, and where the tokens of each piece end."""
        return _send(ends(self.count).astype(np.int32), self.queries)

    def page_table(self) -> Tensor:
        """int32 [c, pages of the most keys], on the device. Entries beyond a piece's keys mean nothing."""
        used = -(-self.most_keys // self.queries.page_size)
        return self.queries.pages[:, :used].to(torch.int32)[_send(self.owner, self.queries)]

    def page_list(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same without gaps. Where the host does not know the keys of the pass, it waits for the device.

        Returns:
            int32 [c + 1], on the host: where the pages of a piece begin; the end.
            int32, on the device: the pages of all pieces, one after the other.
            int32 [c], on the host: tokens on the last page of a piece.
        """
        size, seen = self.queries.page_size, self.queries.seen
        keys = self.key_length.cpu().numpy() if seen is None else seen[ends(self.count)[:-1]]
        used = -(-keys // size)
        bounds = ends(used)
        place = np.arange(bounds[-1]) - np.repeat(bounds[:-1], used)
        owner, place = _send(np.stack([np.repeat(self.owner, used), place]), self.queries)
        pages = self.queries.pages[owner, place].to(torch.int32)
        last = keys - (used - 1) * size
        return torch.from_numpy(bounds.astype(np.int32)), pages, torch.from_numpy(last.astype(np.int32))


def _send(values: np.ndarray, queries: Queries) -> Tensor:
    if queries.seen is not None:
        return torch.from_numpy(values).to(queries.device)
    # What the host knows of such a pass is the same in each, and a CUDA graph could not copy it from there.
    return _constant(values.tobytes(), values.dtype.str, values.shape, queries.device)


@cache  # captured graphs read these for as long as they live
def _constant(content: bytes, dtype: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy()).to(device)


def ends(lengths: np.ndarray) -> np.ndarray:
    """int64 [c + 1]: 0, and where each of these lengths ends, laid one after the other."""
    return np.concatenate([[0], lengths.cumsum()])
