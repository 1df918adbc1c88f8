"""Who holds which page of the KV cache: reference counts, and the pages of prompts that several responses share.

Pure bookkeeping on the host; nothing here touches a tensor. A page is an index into the cache's storage. It is free,
or it has as many references as there are holders: a sequence for each page of its text, and a `Prefix` for each page of
the prompt that it keeps. When the last holder lets go, the page is free again.

Invariants (tests/rollout/test_pages.py):
  - free pages and referenced pages together are always all pages;
  - a page with more than one holder is written by nobody but the one that fills the prefix, and only where nobody else
    reads: a sequence that joins a finished prefix gets its own copy of the page that the prefix fills in part.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field


class PagePool:
    """Counts references to `num_pages` pages."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.references = [0] * num_pages
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one reference.

        Raises:
            IndexError: there are fewer.
        """
        if count > len(self._free):
            raise IndexError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference fewer to each page; those without any are free."""
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)


PrefixKey = tuple[bytes, int]
"""The token ids of a prompt's full blocks, and the block size that they were computed with."""


@dataclass(slots=True, eq=False)
class Prefix:
    """The full blocks of a prompt.

    Attributes:
        length: their tokens.
        pages: that hold them; the last one may be filled in part.
        filled: how many tokens are computed.
        leader: key of the sequence that computes them; None when nobody does.
        users: running sequences that share it or wait for it.
    """

    key: PrefixKey
    length: int
    pages: list[int] = field(default_factory=list)
    filled: int = 0
    leader: int | None = None
    users: int = 0

    @property
    def complete(self) -> bool:
        return self.filled == self.length


class PrefixTable:
    """The prefixes that are kept, those used longest ago first. Each holds a reference to its pages."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._kept: OrderedDict[PrefixKey, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, prefix: Prefix) -> bool:
        return self._kept.get(prefix.key) is prefix

    @property
    def num_idle_pages(self) -> int:
        """Pages that would be free if the prefixes that no running sequence uses were forgotten."""
        return sum(len(prefix.pages) for prefix in self._kept.values() if not prefix.users)

    def find(self, key: PrefixKey, length: int) -> Prefix:
        """The prefix of this key, made if there is none."""
        if key not in self._kept:
            self._kept[key] = Prefix(key, length)
        self._kept.move_to_end(key)
        return self._kept[key]

    def evict(self, in_use: bool) -> bool:
        """Forget the prefix used longest ago, among those that running sequences use or among the others; sequences
        that share its pages keep them. Returns False if there is none to forget.
        """
        for prefix in self._kept.values():
            if bool(prefix.users) == in_use and prefix.pages:
                self.forget(prefix)
                return True
        return False

    def forget(self, prefix: Prefix) -> None:
        del self._kept[prefix.key]
        self.pool.release(prefix.pages)
        prefix.pages = []

    def clear(self) -> None:
        for prefix in list(self._kept.values()):
            self.forget(prefix)
