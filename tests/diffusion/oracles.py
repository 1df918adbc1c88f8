"""Slow and obvious versions of what the diffusion core does, and builders of random traces and items.

The oracles use Python loops over tokens, blocks and steps, and call nothing of the code that they judge.
`random_trace`, `random_group`, `trace_item` and `masked_views` build what is handed to them; other tests import them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.views import Item, Mask, Views, trace_views, views_of

VOCAB = 50  # ordinary tokens; the two ids after them are the mask and the padding token
MASK_ID = VOCAB
PAD_ID = VOCAB + 1


# ------------------------------------------------------------------------------------------------------------- builders
def random_trace(
    prompt_len: int,
    response_len: int,
    block: int,
    rng: np.random.Generator,
    *,
    prompt_ids: np.ndarray | None = None,
    prompt_key: str = "p0",
    sample: int = 0,
    vocab: int = VOCAB,
    full: bool = False,
    behind: int = 3,
    horizon: int | None = None,
) -> Trace:
    """A response as a rollout would leave it: whole decode blocks, each unmasked in a random order and number of steps.

    Args:
        prompt_len, response_len: tokens; what is left of the terminal block becomes the tail.
        block: decode block size.
        prompt_ids: shared by a group; random otherwise.
        full: of a model of full attention, whose decode blocks are counted from the first response token.
        behind: tokens that could have come behind those; a model of full attention sees their masks.
        horizon: how many positions behind its block such a model is shown.
    """
    if prompt_ids is None:
        prompt_ids = rng.integers(0, vocab, prompt_len)
    origin = prompt_len if full else 0
    generated = response_len + -(prompt_len + response_len - origin) % block
    steps = np.zeros(generated, dtype=np.int64)
    step, position = 0, prompt_len
    while position < prompt_len + generated:
        end = origin + ((position - origin) // block + 1) * block
        waiting = list(rng.permutation(np.arange(position, end)))
        while waiting:
            step += 1
            take = int(rng.integers(1, len(waiting) + 1))
            for chosen in waiting[:take]:
                steps[chosen - prompt_len] = step
            waiting = waiting[take:]
        position = end
    tokens = rng.integers(0, vocab, generated)
    logprobs = -rng.exponential(1.0, response_len)
    return Trace(
        prompt_ids=np.asarray(prompt_ids, dtype=np.int64),
        response_ids=tokens[:response_len],
        tail_ids=tokens[response_len:],
        steps=steps[:response_len],
        tail_steps=steps[response_len:],
        logprobs=logprobs,
        sampling_logprobs=logprobs.copy(),
        weight_versions=np.zeros(response_len, dtype=np.int64),
        sampling=SamplingParams(
            block_size=block, denoising_steps=block, max_new_tokens=generated + behind, horizon=horizon
        ),
        prompt_key=prompt_key,
        sample=sample,
        finish_reason="stop",
        num_forwards=step,
    )


def masked_views(
    prompt_length: int, length: int, grid: Grid, schedule: MaskSchedule, stream: int, predict_until: int
) -> Views:
    """One view per block with masks drawn from the schedule. Tokens from `predict_until` on are not predicted."""
    response = np.arange(prompt_length, length)
    block = np.asarray(grid.block_of(response, prompt_length))
    hidden, weight = schedule.draw(stream, torch.from_numpy(response), torch.from_numpy(block))
    mask = Mask(hidden.numpy(), response < predict_until, weight.numpy())
    return views_of(prompt_length, length, grid, [mask])


def trace_item(trace: Trace, grid: Grid, shrinkage: int = 1) -> Item:
    """The trace as an item of its prompt's group, with the views of TraceRL."""
    return Item(trace.prompt_key, trace.tokens, len(trace.prompt_ids), trace_views(trace, grid, shrinkage), grid)


def random_group(
    prompt_len: int,
    response_lens: list[int],
    block: int,
    rng: np.random.Generator,
    prompt_key: str = "p0",
    **canvas: object,
) -> list[Trace]:
    """Several responses to one random prompt. `canvas`: full, behind and horizon of `random_trace`."""
    prompt_ids = rng.integers(0, VOCAB, prompt_len)
    return [
        random_trace(
            prompt_len, length, block, rng, prompt_ids=prompt_ids, prompt_key=prompt_key, sample=sample, **canvas
        )
        for sample, length in enumerate(response_lens)
    ]


# ----------------------------------------------------------------------------------------------------------- visibility
def sees(q: tuple[int, ...], k: tuple[int, ...], same_slot: bool) -> bool:
    """DESIGN's sentence about (group, response, view, block, position), word by word."""
    q_group, q_response, q_view, q_block, _ = q
    k_group, k_response, k_view, k_block, _ = k
    if q_group == -1 or k_group == -1:
        return same_slot
    if q_group != k_group:
        return False
    if k_response != -1 and k_response != q_response:
        return False
    if k_view == q_view and k_block == q_block:
        return True
    return k_view == 0 and k_block < q_block


def visibility(layout) -> np.ndarray:
    """bool [T, T] by a double loop over the tokens of a layout."""
    columns = [
        column.tolist() for column in (layout.group, layout.response, layout.view, layout.block, layout.position)
    ]
    tokens = list(zip(*columns))
    return np.array([[sees(q, k, i == j) for j, k in enumerate(tokens)] for i, q in enumerate(tokens)], dtype=bool)


# ---------------------------------------------------------------------------------------------------------------- steps
def block_index(position: int, prompt_len: int, grid: Grid) -> int:
    """Counted by walking: from position 0, or in both directions from the first response token."""
    if grid.block_size is None:
        return 0
    if grid.anchor == "absolute":
        starts = [p for p in range(position + 1) if p % grid.block_size == 0]
        return len(starts) - 1
    starts = {prompt_len + i * grid.block_size for i in range(-position - prompt_len - 2, position + 2)}
    return len(
        [p for p in range(1, position + 1) if p in starts]
    )  # the first block of the prompt starts at 0, ragged or not


def merged_steps(steps: list[int], shrinkage: int) -> list[int]:
    """Every `shrinkage` consecutive distinct values become the largest of them."""
    distinct, merged = sorted(set(steps)), {}
    for start in range(0, len(distinct), shrinkage):
        together = distinct[start : start + shrinkage]
        for value in together:
            merged[value] = max(together)
    return [merged[value] for value in steps]


@dataclass(frozen=True)
class State:
    """The text as it stood when some tokens of it were decided, up to the end of the block being denoised."""

    block: int
    shown: tuple[int, ...]  # token at each position, MASK_ID where it was hidden
    block_of: tuple[int, ...]
    decided: tuple[int, ...]  # positions

    @property
    def visible(self) -> np.ndarray:
        """The engine's rule: everything in earlier blocks, and the own block in both directions."""
        return np.array([[k <= q for k in self.block_of] for q in self.block_of])


def states(trace: Trace, grid: Grid, shrinkage: int = 1) -> list[State]:
    """One state per training block and (merged) step in which a response token was decided.

    Each is the finished blocks, then the block with its masks. Under full attention it is the prompt and the longest
    response, with masks where nothing stands yet; without what a step behind a block's first was not shown.
    """
    if grid.block_size is None:
        return canvas_states(trace, shrinkage)
    prompt_len, tokens = len(trace.prompt_ids), [int(token) for token in trace.tokens]
    raw = [0] * prompt_len + [int(step) for step in trace.all_steps]
    response_end, written = prompt_len + len(trace.response_ids), len(tokens)
    while grid.anchor == "absolute" and len(tokens) % grid.block_size:  # a larger block is shown whole
        tokens.append(MASK_ID)
    block_of = [block_index(position, prompt_len, grid) for position in range(len(tokens))]
    found = []
    for block in sorted(set(block_of)):
        mine = [p for p in range(written) if block_of[p] == block and p >= prompt_len]
        step_of = dict(zip(mine, merged_steps([raw[p] for p in mine], shrinkage)))
        for step in sorted(set(step_of.values())):
            decided = tuple(p for p in mine if step_of[p] == step and p < response_end)
            if not decided:
                continue
            upto = [p for p in range(len(tokens)) if block_of[p] <= block]
            shown = tuple(MASK_ID if p in step_of and step_of[p] >= step else tokens[p] for p in upto)
            found.append(State(block, shown, tuple(block_of[p] for p in upto), decided))
    return found


def canvas_states(trace: Trace, shrinkage: int = 1) -> list[State]:
    """The states of a model of full attention. Of steps that are merged, the one that was shown most counts."""
    prompt, size = [int(token) for token in trace.prompt_ids], trace.sampling.block_size
    made = [int(token) for token in trace.tokens[len(prompt) :]]
    raw = [int(step) for step in trace.all_steps]
    merged = merged_steps(raw, shrinkage)
    longest, horizon = trace.sampling.max_new_tokens, trace.sampling.horizon
    found = []
    for step in sorted(set(merged)):
        shown_until = 0
        for offset, own in enumerate(raw):
            if merged[offset] != step:
                continue
            block = offset // size
            first = min(one for other, one in enumerate(raw) if other // size == block)
            seen = longest if own == first or horizon is None else min((block + 1) * size + horizon, longest)
            shown_until = max(shown_until, seen)
        text = list(prompt)
        for offset in range(shown_until):
            text.append(made[offset] if offset < len(made) and merged[offset] < step else MASK_ID)
        decided = [len(prompt) + i for i, one in enumerate(merged) if one == step and i < len(trace.response_ids)]
        if decided:
            found.append(State(0, tuple(text), (0,) * len(text), tuple(decided)))
    return found


# --------------------------------------------------------------------------------------------------------- fingerprints
def _scramble(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.uint64)
    for _ in range(2):
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x632BE59BD9B4E019)
    return x ^ (x >> np.uint64(32))


def fingerprints(tokens: np.ndarray, positions: np.ndarray, visible: np.ndarray, layers: int = 3) -> np.ndarray:
    """What a network of `layers` attention layers can know at each slot, as one number (uint64 [T]).

    A slot's number is made of its token, its position, and the multiset of the numbers that it sees one layer below.
    Equal numbers: no weights can tell the two apart. A duplicate, foreign or stale key changes the number.
    """
    own = _scramble(_scramble(np.asarray(tokens)) + np.asarray(positions).astype(np.uint64))
    mask, now = visible.astype(np.uint64), own
    for _ in range(layers):
        now = _scramble(own * np.uint64(3) + _scramble(mask @ _scramble(now)))
    return now


def expected_fingerprints(trace: Trace, grid: Grid, shrinkage: int = 1) -> dict[int, int]:
    """Fingerprint of every response token (by its index) in the state in which it is learned."""
    expected = {}
    for state in states(trace, grid, shrinkage):
        prints = fingerprints(np.array(state.shown), np.arange(len(state.shown)), state.visible)
        for position in state.decided:
            index = position - len(trace.prompt_ids)
            assert index not in expected
            expected[index] = int(prints[position])
    return expected


def row_fingerprints(row) -> dict[tuple[int, int], int]:
    """Fingerprint of the slot of every target of a built row, by (item id, index in the response)."""
    prints = fingerprints(row.tokens.numpy(), row.layout.position.numpy(), visibility(row.layout))
    targets = row.targets
    keys = list(zip(targets.response.tolist(), targets.index.tolist()))
    assert len(set(keys)) == len(keys), "a token is predicted twice"
    return {key: int(prints[slot]) for key, slot in zip(keys, targets.slot.tolist())}
