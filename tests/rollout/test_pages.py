"""Pages and prefixes: nothing is lost, nothing is held twice."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.rollout.pages import PagePool, PrefixTable


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    assert len(set(pages)) == 3 and pool.num_free == 1
    pool.share(pages[:2])
    pool.release(pages)
    assert pool.num_free == 2
    pool.release(pages[:2])
    assert pool.num_free == 4 and sorted(pool.take(4)) == [0, 1, 2, 3]


def test_more_than_there_is_cannot_be_taken() -> None:
    pool = PagePool(2)
    pool.take(1)
    with pytest.raises(IndexError, match="2 pages wanted, 1 free"):
        pool.take(2)
    assert pool.num_free == 1


def test_random_holders_against_a_plain_count() -> None:
    rng, pool = np.random.default_rng(0), PagePool(50)
    held: list[list[int]] = []
    for _ in range(2000):
        if rng.random() < 0.5 and pool.num_free >= 5:
            held.append(pool.take(int(rng.integers(1, 6))))
        elif held and rng.random() < 0.4:
            shared = held[rng.integers(len(held))]
            shared = shared[: rng.integers(1, len(shared) + 1)]
            pool.share(shared)
            held.append(list(shared))
        elif held:
            pool.release(held.pop(rng.integers(len(held))))
        counts = np.bincount([page for pages in held for page in pages], minlength=50)
        assert counts.tolist() == pool.references
        assert pool.num_free == int((counts == 0).sum())


def filled(table: PrefixTable, name: bytes, pages: int, users: int = 0):
    prefix = table.find((name, 4), 16)
    prefix.pages, prefix.users = table.pool.take(pages), users
    return prefix


def test_idle_prefixes_go_first_and_the_oldest_of_them() -> None:
    table = PrefixTable(PagePool(10))
    a, b, c = (filled(table, name, 2, users) for name, users in ((b"a", 0), (b"b", 1), (b"c", 0)))
    assert table.num_idle_pages == 4 and len(table) == 3
    assert table.find((b"a", 4), 16) is a  # asked for again: c is the oldest idle one now
    assert table.evict(in_use=False) and c not in table and a in table and b in table
    assert table.evict(in_use=False) and a not in table
    assert not table.evict(in_use=False) and table.pool.num_free == 8
    assert table.evict(in_use=True) and table.pool.num_free == 10 and not len(table)


def test_sequences_keep_the_pages_of_a_forgotten_prefix() -> None:
    table = PrefixTable(PagePool(4))
    prefix = filled(table, b"a", 2)
    pages = list(prefix.pages)
    table.pool.share(pages)
    table.clear()
    assert table.pool.num_free == 2 and prefix.pages == [] and prefix not in table
    assert table.find(prefix.key, 16) is not prefix
    table.pool.release(pages)
    assert table.pool.num_free == 4


def test_a_prefix_is_told_by_its_tokens_and_its_block_size() -> None:
    table = PrefixTable(PagePool(1))
    assert table.find((b"a", 4), 16) is not table.find((b"a", 8), 16)
    assert not table.find((b"a", 4), 16).complete
