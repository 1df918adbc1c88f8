"""Passes made of random numbers, on which backends must agree.

They have what a kernel can get wrong: chunks of prompts, a commit together with the next block, a block alone, tokens
that are computed and not stored, pages that texts share, texts that end within a page, and full attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.model.row_params import Attention
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.kv_cache import BlockKVCache, CacheShape
from megatron_dlm.rollout.plan import Span

_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-10}
_LAYERS, _SHARING = 2, 2  # query heads per key-value head

Backend = Callable[[BlockKVCache, Queries], Attention]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over two layers: queries, keys and values [T, 1, heads, d] of each."""

    queries: Queries
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]


def random_passes(
    shape: CacheShape, device: torch.device, full: bool, seed: int = 0, texts: int = 5, blocks: tuple[int, ...] = (4, 8)
) -> tuple[int, list[Pass]]:
    """Some texts from their prompts to their second block after, in passes as an engine makes them.

    Args:
        full: under full attention, where a later pass computes a window of the text.

    Returns: how many pages they need, and the passes, to be made in their order.
    """
    rng = np.random.default_rng(seed)
    size = shape.page_size
    block = rng.choice(blocks, texts)
    prompt = block * rng.integers(1, 3 * max(size, 8) // block + 2)
    longest = int((prompt + 3 * block).max())
    columns = -(-longest // size)
    table = 1 + rng.permutation(texts * columns).reshape(texts, columns)
    shared = 0
    if not full:  # the second text has the prompt of the first, and its full pages
        block[1], prompt[1] = block[0], prompt[0]
        shared = prompt[0] // size
        table[1, :shared] = table[0, :shared]
    table_, slots = torch.from_numpy(table).to(device), np.arange(texts)
    passes = []

    def make(spans: list[Span]) -> None:
        slot = torch.tensor([span.slot for span in spans], device=device)
        sizes = None if full else [int(block[span.slot]) for span in spans]
        queries = Queries.of(spans, sizes, table_, slot, size)
        drawn = lambda heads: [
            torch.from_numpy(rng.standard_normal((len(queries.position), 1, heads, shape.head_dim)))
            .to(shape.dtype)
            .to(device)
            for _ in range(_LAYERS)
        ]
        passes.append(Pass(queries, drawn(shape.kv_heads * _SHARING), drawn(shape.kv_heads), drawn(shape.kv_heads)))

    span = lambda slot, first, end, kept=0: Span(int(slot), int(first), int(end), int(first + kept), int(first), True)
    if full:
        make([span(slot, 0, prompt[slot] + block[slot]) for slot in slots])
        make([span(slot, prompt[slot] - 1, prompt[slot] + block[slot]) for slot in slots[::-1]])
        make([span(slot, 0 if slot % 2 else prompt[slot], prompt[slot] + 2 * block[slot] - 1) for slot in slots])
        return int(table.max()) + 1, passes
    # A chunk of one prompt beside the whole of others; the second text waits for the pages that it shares.
    long, alone = slots[-1], slots[slots != 1][:-1]
    chunk = max(prompt[long] // 2 // block[long], 1) * block[long]
    make([span(slot, 0, prompt[slot]) for slot in alone] + [span(long, 0, chunk)])
    own = shared * size // block[1] * block[1]
    rest = [span(1, own, prompt[1] + block[1], shared * size - own), span(long, chunk, prompt[long] + block[long])]
    make(rest + [span(slot, prompt[slot], prompt[slot] + block[slot]) for slot in alone])
    # Finished blocks together with the next ones, blocks alone, and, for a shift of the logits, the token before.
    ways = (
        lambda at, block: (at, at + 2 * block),
        lambda at, block: (at, at + block),
        lambda at, block: (at - 1, at + block, 1),
    )
    third = [span(slot, *ways[slot % 3](prompt[slot], block[slot])) for slot in slots]
    make(third)
    return int(table.max()) + 1, passes


def outputs(backend: Backend, shape: CacheShape, pages: int, passes: list[Pass], scale: float) -> Iterator[Tensor]:
    """What a backend makes of these passes, [T, heads * d] for each pass and layer."""
    cache = BlockKVCache(replace(shape, layers=_LAYERS), pages, passes[0].q[0].device)
    cache.wake()
    for one in passes:
        attention = backend(cache, one.queries)
        for layer in range(_LAYERS):
            yield attention(layer + 1, one.q[layer], one.k[layer], one.v[layer], scale)[:, 0]


@torch.no_grad()  # as engines run: kernels that are compiled for passes with gradients are others
def largest_difference(one: Backend, other: Backend, shape: CacheShape, device: torch.device, seed: int = 0) -> float:
    """Between the outputs of two backends, under blocks and under full attention."""
    worst = 0.0
    for full in (False, True):
        pages, passes = random_passes(shape, device, full, seed)
        scale = shape.head_dim**-0.5
        for mine, theirs in zip(
            outputs(one, shape, pages, passes, scale), outputs(other, shape, pages, passes, scale), strict=True
        ):
            gap = (mine.double() - theirs.double()).abs().max().item()
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def agrees(one: Backend, other: Backend, shape: CacheShape, device: torch.device) -> bool:
    """Whether a backend works here and computes what another one does, up to rounding. What it raises is logged."""
    try:
        return largest_difference(one, other, shape, device) <= tolerance(shape.dtype)
    except Exception as error:  # of a kernel library or of its compiler: whatever it says, it cannot be used
        name = getattr(one, "__name__", type(one).__name__)
        logging.getLogger(__name__).info("rollout attention %s does not work here: %s", name, error)
        return False


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference between outputs of about unit size that rounding explains."""
    return _TOLERANCE[dtype]
