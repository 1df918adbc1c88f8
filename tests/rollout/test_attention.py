"""Attention over the paged cache, against one query at a time."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm.rollout.attention import sdpa
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.kv_cache import BlockKVCache, CacheShape, num_pages
from megatron_dlm.rollout.plan import Span

SLOTS, LENGTH, BLOCK, HEADS, KV_HEADS, WIDTH, PAGE = 4, 16, 4, 4, 2, 8, 3
PAGES = 6  # per slot
SHAPE = CacheShape(2, PAGE, KV_HEADS, WIDTH, torch.float64)


def new_cache() -> BlockKVCache:
    cache = BlockKVCache(SHAPE, SLOTS * PAGES, torch.device("cpu"))
    cache.wake()
    return cache


def page_table() -> torch.Tensor:
    """Every slot's pages, scattered over the cache."""
    return torch.randperm(SLOTS * PAGES, generator=torch.Generator().manual_seed(3)).view(SLOTS, PAGES)


def queries(parts: list[tuple[int, int, int]], blocks: bool = True, write_from: int = 0) -> Queries:
    """From (slot, first position, one past the last); under blocks the last position ends a block."""
    spans = [Span(slot, first, end, max(first, write_from), 0, True) for slot, first, end in parts]
    slot = torch.tensor([slot for slot, _, _ in parts])
    return Queries.of(spans, [BLOCK] * len(parts) if blocks else None, page_table(), slot, PAGE)


def texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of every slot at every position."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(SLOTS, LENGTH, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def run(cache, parts, q, k, v, layer: int = 1, **kind) -> torch.Tensor:
    """[T, heads * width]"""
    asked = queries(parts, **kind)
    slot = torch.tensor([slot for slot, _, _ in parts])[asked.sequence]
    take = lambda x: x[slot, asked.position][:, None]
    return sdpa.GatheredAttention(cache, asked)(layer, take(q), take(k), take(v), 0.3)[:, 0]


def expected(q, k, v, slot: int, position: int, end: int) -> torch.Tensor:
    """One query over the keys of its text before `end`, head by head."""
    outputs = []
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        weights = (k[slot, :end, group] @ q[slot, position, head] * 0.3).softmax(0)
        outputs.append(weights @ v[slot, :end, group])
    return torch.cat(outputs)


def check(output: torch.Tensor, parts, q, k, v, blocks: bool = True) -> None:
    line = 0
    for slot, first, end in parts:
        for position in range(first, end):
            seen = (position // BLOCK + 1) * BLOCK if blocks else end
            torch.testing.assert_close(output[line], expected(q, k, v, slot, position, seen), rtol=1e-12, atol=1e-12)
            line += 1
    assert line == len(output)


def test_sequences_at_different_places_share_a_pass() -> None:
    """A prompt of three blocks, a block of its own, a finished block with the next one."""
    q, k, v = texts()
    cache = new_cache()
    run(cache, [(0, 0, 4), (2, 0, 12)], q, k, v)
    parts = [(1, 0, 12), (0, 4, 8), (2, 8, 16)]
    check(run(cache, parts, q, k, v), parts, q, k, v)


def test_each_layer_has_its_own_keys() -> None:
    (q, k, v), (_, other, values) = texts(), texts(1)
    cache = new_cache()
    run(cache, [(0, 0, 8)], q, k, v, layer=1)
    run(cache, [(0, 0, 8)], q, other, values, layer=2)
    parts = [(0, 8, 12)]
    check(run(cache, parts, q, k, v, layer=1), parts, q, k, v)
    check(run(cache, parts, q, other, values, layer=2), parts, q, other, values)


def test_a_block_is_overwritten_until_it_is_finished() -> None:
    (q, k, v), (_, noisy, noise) = texts(), texts(1)
    cache = new_cache()
    run(cache, [(3, 0, 8)], q, noisy, noise)
    parts = [(3, 0, 8)]
    check(run(cache, parts, q, k, v), parts, q, k, v)


def test_what_is_stored_already_is_not_stored_again() -> None:
    (q, k, v), (_, wrong, values) = texts(), texts(1)
    cache = new_cache()
    run(cache, [(0, 0, 4)], q, k, v)
    mixed_k, mixed_v = wrong.clone(), values.clone()
    mixed_k[0, 4:], mixed_v[0, 4:] = k[0, 4:], v[0, 4:]
    parts = [(0, 3, 8)]  # position 3 is computed, but its keys must stay
    check(run(cache, parts, q, mixed_k, mixed_v, write_from=4), parts, q, k, v)


def test_under_full_attention_a_span_sees_all_of_itself_and_what_is_before() -> None:
    q, k, v = texts()
    cache = new_cache()
    run(cache, [(0, 0, 16), (1, 0, 7)], q, k, v, blocks=False)
    parts = [(0, 5, 11), (1, 3, 9), (2, 0, 2)]
    check(run(cache, parts, q, k, v, blocks=False), parts, q, k, v, blocks=False)


@pytest.mark.parametrize("few", [1, 1000])
def test_padding_to_similar_lengths_changes_nothing(few: int, monkeypatch) -> None:
    monkeypatch.setattr(sdpa, "_FEW_QUERIES", few)
    monkeypatch.setattr(sdpa, "_FEW_KEYS", few)
    q, k, v = texts()
    cache = new_cache()
    run(cache, [(0, 0, 12)], q, k, v)
    parts = [(0, 12, 16), (1, 0, 4), (2, 0, 16), (3, 0, 8)]
    check(run(cache, parts, q, k, v), parts, q, k, v)


def test_a_long_prompt_does_not_widen_the_others() -> None:
    cache = BlockKVCache(CacheShape(1, 16, 1, 1, torch.float64), 41 * 63, torch.device("cpu"))
    table = torch.arange(41 * 63).view(41, 63)
    spans = [Span(0, 0, 1000, 0, 996, True)] + [Span(slot, 96, 100, 96, 96, True) for slot in range(1, 41)]
    asked = Queries.of(spans, [4] * 41, table, torch.arange(41), 16)
    buckets = sdpa.GatheredAttention(cache, asked).buckets.buckets
    assert sum(one.token.numel() * one.pages.shape[1] * 16 for one in buckets) < 1000 * 1008 + 41 * 4 * 112 * 1.1


def test_pages_are_copied_in_all_layers_all_sources_first() -> None:
    cache = new_cache()
    cache.storage.copy_(torch.arange(cache.storage.numel(), dtype=torch.float64).view_as(cache.storage))
    before = cache.storage.clone()
    cache.copy([(0, 1), (1, 2), (5, 3)])
    for source, destination in ((0, 1), (1, 2), (5, 3), (4, 4), (0, 0)):
        assert torch.equal(cache.storage[:, destination], before[:, source])


def test_memory_is_given_back_and_taken_again() -> None:
    cache = new_cache()
    taken = (SLOTS * PAGES + 1) * SHAPE.page_bytes  # and the scratch page
    assert cache.nbytes == taken == 2 * 2 * (SLOTS * PAGES + 1) * PAGE * KV_HEADS * WIDTH * 8
    cache.sleep()
    assert cache.asleep and cache.nbytes == 0
    cache.wake()
    assert cache.nbytes == taken and not cache.storage.any()


def test_how_many_pages_fit() -> None:
    assert num_pages(SHAPE, 10, 16, None) == 10 * (6 + 1)  # 16 tokens in pages of 3, and a copy of a shared page
    assert num_pages(SHAPE, 10, 16, 20 * SHAPE.page_bytes + 5) == 20
    assert num_pages(SHAPE, 10, 16, 7 * SHAPE.page_bytes) == 7
