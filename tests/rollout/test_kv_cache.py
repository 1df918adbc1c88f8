from __future__ import annotations

import torch

from megatron_dlm.rollout import kv_cache
from megatron_dlm.rollout.kv_cache import BlockKVCache, CachedAttention, Ragged

SLOTS, LENGTH, BLOCK, HEADS, KV_HEADS, WIDTH = 4, 16, 4, 4, 2, 8


def new_cache() -> BlockKVCache:
    return BlockKVCache(SLOTS, LENGTH, 2, KV_HEADS, WIDTH, torch.float64, torch.device("cpu"))


def ragged(parts: list[tuple[int, int, int]]) -> Ragged:
    """A batch from (slot, first position, one past the last); the last position ends a block."""
    column = lambda values: torch.tensor(values, dtype=torch.int64)
    places = [(n, place) for n, (_, start, end) in enumerate(parts) for place in range(start, end)]
    return Ragged(
        slot=column([slot for slot, _, _ in parts]),
        count=[end - start for _, start, end in parts],
        sequence=column([n for n, _ in places]),
        position=column([place for _, place in places]),
        last_visible=column([(place // BLOCK + 1) * BLOCK for _, place in places]),
        key_length=[end for _, _, end in parts],
    )


def texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of every slot at every position."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(SLOTS, LENGTH, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def run(
    cache: BlockKVCache, batch: Ragged, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 1
) -> torch.Tensor:
    slot = batch.slot[batch.sequence]
    take = lambda x: x[slot, batch.position][:, None]
    return CachedAttention(cache, batch)(layer, take(q), take(k), take(v), 0.3)[:, 0]


def expected(q, k, v, slot: int, position: int) -> torch.Tensor:
    """One query over the keys of its text up to the end of its block, head by head."""
    end, outputs = (position // BLOCK + 1) * BLOCK, []
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        weights = (k[slot, :end, group] @ q[slot, position, head] * 0.3).softmax(0)
        outputs.append(weights @ v[slot, :end, group])
    return torch.cat(outputs)


def check(output: torch.Tensor, batch: Ragged, q, k, v) -> None:
    for token, (n, position) in enumerate(zip(batch.sequence.tolist(), batch.position.tolist())):
        torch.testing.assert_close(
            output[token], expected(q, k, v, int(batch.slot[n]), position), rtol=1e-12, atol=1e-12
        )


def test_one_block_of_one_sequence() -> None:
    q, k, v = texts()
    batch = ragged([(0, 0, BLOCK)])
    check(run(new_cache(), batch, q, k, v), batch, q, k, v)


def test_sequences_at_different_places_share_a_pass() -> None:
    """A prefill, a block after a finished one, and one alone; then each goes on from what the cache holds."""
    q, k, v = texts()
    cache = new_cache()
    for batch in (
        ragged([(2, 0, 12), (0, 0, 8), (3, 0, 4)]),
        ragged([(0, 4, 12), (2, 12, 16), (3, 4, 8), (1, 0, 4)]),
        ragged([(1, 0, 8), (0, 8, 16)]),
    ):
        check(run(cache, batch, q, k, v), batch, q, k, v)


def test_the_keys_of_the_block_in_progress_are_overwritten() -> None:
    q, k, v = texts()
    _, draft_k, draft_v = texts(1)
    cache = new_cache()
    draft_k[:, :4], draft_v[:, :4] = k[:, :4], v[:, :4]
    run(cache, ragged([(0, 0, 8)]), q, draft_k, draft_v)
    batch = ragged([(0, 4, 8)])
    check(run(cache, batch, q, k, v), batch, q, k, v)


def test_a_slot_forgets_its_last_owner() -> None:
    q, k, v = texts()
    cache = new_cache()
    run(cache, ragged([(0, 0, 16), (1, 0, 16)]), q, 100 * k, 100 * v)
    batch = ragged([(0, 0, 8), (1, 0, 4)])
    check(run(cache, batch, q, k, v), batch, q, k, v)


def test_layers_do_not_mix() -> None:
    q, k, v = texts()
    other = texts(1)
    cache, whole, last = new_cache(), ragged([(0, 0, 8)]), ragged([(0, 8, 12)])
    for layer, content in ((1, (q, k, v)), (2, other)):
        run(cache, whole, *content, layer=layer)
    check(run(cache, last, q, k, v, layer=1), last, q, k, v)
    check(run(cache, last, *other, layer=2), last, *other)


def test_a_long_prompt_among_short_queries(monkeypatch) -> None:
    """However the sequences are cut into calls, each query gets the same."""
    q, k, v = texts()
    cache, batch = new_cache(), ragged([(0, 0, 4), (2, 0, 16), (1, 0, 8), (3, 4, 8)])
    monkeypatch.setattr(kv_cache, "_FEW_QUERIES", 1)
    monkeypatch.setattr(kv_cache, "_FEW_KEYS", 1)
    cache.storage[0, 0, 3, :4], cache.storage[0, 1, 3, :4] = k[3, :4], v[3, :4]
    shapes = [tuple(bucket.mask.shape) for bucket in CachedAttention(cache, batch).buckets]
    assert shapes == [(1, 1, 16, 16), (1, 1, 8, 8), (1, 1, 4, 8), (1, 1, 4, 4)]
    check(run(cache, batch, q, k, v), batch, q, k, v)


def test_the_work_of_a_pass_is_that_of_its_tokens() -> None:
    """A prompt of 1000 tokens costs the others nothing."""
    cache = BlockKVCache(41, 1000, 1, 1, 1, torch.float64, torch.device("cpu"))
    batch = ragged([(n, 4, 8) for n in range(40)] + [(40, 0, 1000)])
    masks = [bucket.mask for bucket in CachedAttention(cache, batch).buckets]
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, 1000, 1000), (40, 1, 4, 8)]
