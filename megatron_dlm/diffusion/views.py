"""Which noisy copies of a text a model learns from.

An `Item` is one text of a group together with its views: copies of single blocks in which some tokens are hidden and
some of the hidden ones are predicted. Supervised fine-tuning makes one or more per block with freshly drawn masks;
TraceRL makes one per denoising step that the block really took. A view without a predicted token is not made. What an
autoregressive model predicts needs no copy: its views are the finished text itself.

Under full attention a rollout writes on a canvas, the prompt and the longest response that was allowed, which is all
masks at first (rollout/engine.py). What decides a token sees the masks behind the response too, wherever that ends
later; so a view of a trace shows the canvas, or as much of it as the `horizon` of the draw let the pass see.

Invariants (tests/diffusion/test_views.py):
  - each token is predicted in exactly one view of a trace, in the state in which it was decided;
  - what stands behind the last token of a trace is a mask in every view, and never predicted;
  - cutting the views of an item into several items changes no loss and no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.trace import Trace, shrink


@dataclass(frozen=True, slots=True)
class Views:
    """n views of one text, each over a window of one attention block (W = block size; under full attention the text's
    length, or for a trace that of the canvas).

    Attributes:
        block: int64 [n], block index, ascending.
        position: int64 [n, W], absolute positions, -1 where the block is ragged or the view ends earlier.
        masked: bool [n, W], tokens shown as the mask token.
        target: bool [n, W], tokens predicted; a subset of `masked`.
        weight: float64 [n, W], weight of each target.
        clean: the views are no copies. Nothing is hidden, and the targets are tokens of the finished text, each
            predicted by the token before it; in blocks of one token that is what an autoregressive model does.
    """

    block: np.ndarray
    position: np.ndarray
    masked: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    clean: bool = False

    @property
    def num_targets(self) -> int:
        return int(self.target.sum())

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n], tokens that each view adds to the finished text."""
        sizes = (self.position >= 0).sum(axis=1)
        return np.zeros_like(sizes) if self.clean else sizes

    def chosen(self, which: slice | np.ndarray) -> Views:
        """Some of the views alone: a slice of them, or their numbers."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[which] for name, value in columns.items() if isinstance(value, np.ndarray)})


@dataclass(frozen=True, slots=True)
class Item:
    """One text and its views, ready to be laid out in a row.

    Attributes:
        group: which prompt; items of one group in one row share the prompt's full blocks.
        tokens: int64 [L], prompt, response and the rest of the terminal block. Views may show positions behind them, as
            masks.
        prompt_length: P; the first P tokens are the prompt.
        views: what is learned from it.
        grid: how positions fall into blocks.
    """

    group: str
    tokens: np.ndarray
    prompt_length: int
    views: Views
    grid: Grid

    @property
    def shared_length(self) -> int:
        """Tokens of the prompt's full blocks."""
        return self.grid.shared_prompt(self.prompt_length)

    @property
    def clean_end(self) -> int:
        """One past the last clean token that some view reads: the start of the last block that has a view."""
        if not len(self.views.block):
            return self.shared_length
        if self.views.clean:
            return int(self.views.position.max()) + 1
        return max(
            self.grid.span(int(self.views.block[-1]), self.prompt_length, len(self.tokens))[0], self.shared_length
        )

    @property
    def own_length(self) -> int:
        """Tokens that this item adds to a row that already holds its group's prompt; 0 without views."""
        return self.clean_end - self.shared_length + int(self.views.sizes.sum())


def _windows(grid: Grid, prompt_length: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that hold a response token, int64 [b], and their positions, int64 [b, W], -1 outside the text."""
    if grid.block_size is None:
        return np.zeros(1, dtype=np.int64), np.arange(length)[None]
    blocks = np.arange(grid.block_of(prompt_length, prompt_length), grid.block_of(length - 1, prompt_length) + 1)
    position = blocks[:, None] * grid.block_size - grid.offset(prompt_length) + np.arange(grid.block_size)
    return blocks, np.where((position >= 0) & (position < length), position, -1)


def no_views(grid: Grid, length: int) -> Views:
    empty = np.zeros((0, grid.block_size or length))
    whole, truth = empty.astype(np.int64), empty.astype(bool)
    return Views(np.zeros(0, np.int64), whole, truth, truth, empty)


def windows(trace: Trace, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a trace that hold a response token, int64 [b], and their positions, int64 [b, W], -1 outside the
    text. What goes on behind the trace's last token are masks: under full attention to the end of the canvas; on the
    absolute grid to the end of a block larger than those of the rollout, as it would be shown whole.
    """
    prompt, length = len(trace.prompt_ids), len(trace.tokens)
    if grid.block_size is None:
        length = trace.canvas_length
    elif grid.anchor == "absolute":
        length = -(-length // grid.block_size) * grid.block_size
    return _windows(grid, prompt, length)


def _shown_until(trace: Trace) -> np.ndarray:
    """Under full attention: int64 [R + tail], one past the last position that the pass that decided a token was shown.

    The first step of a decoding block shows the whole canvas, later ones `horizon` positions behind the block.
    """
    sampling, steps, canvas = trace.sampling, trace.all_steps, trace.canvas_length
    block = np.arange(len(steps)) // sampling.block_size  # counted from the first response token
    first_step = np.full(int(block.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_step, block, steps)
    horizon = canvas if sampling.horizon is None else sampling.horizon
    block_end = np.minimum(len(trace.prompt_ids) + (block + 1) * sampling.block_size, canvas)
    return np.where(steps == first_step[block], canvas, np.minimum(block_end + horizon, canvas))


def trace_views(trace: Trace, grid: Grid, shrinkage: int = 1, oldest_version: int = 0) -> Views:
    """One view per block and (shrunk) denoising step, each token predicted in the state in which it was decided.

    The tail after the stop token is hidden in the states in which it was hidden, and never predicted. Nor are tokens
    that weights before `oldest_version` decided; they are context. Weights are 1.

    Under full attention the state is all that the deciding pass was shown; where shrinkage merges steps, what the one
    that saw most was shown. A rollout with a prefix cache used older keys for the text before the block at all but the
    block's first step; here they are those of the state itself.

    Source: TraceRL, arXiv 2509.06949, section 4.1.
    """
    prompt, length = len(trace.prompt_ids), len(trace.tokens)
    if length == prompt:  # aborted before its first token
        return no_views(grid, length)
    blocks, position = windows(trace, grid)
    beyond = position >= length  # masks, whatever the step
    is_response = (position >= prompt) & ~beyond
    steps = np.where(
        is_response, trace.all_steps[np.where(is_response, position - prompt, 0)], 0
    )  # [b, W]; 0 stands for known text
    if shrinkage > 1:
        for row, mine in zip(steps, is_response):
            row[mine] = shrink(row[mine], shrinkage)
    learned = np.append(trace.weight_versions >= oldest_version, np.zeros(len(trace.tail_ids), dtype=bool))
    predicted = is_response & learned[np.where(is_response, position - prompt, 0)]
    if not predicted.any():
        return no_views(grid, length)
    # (window, step) pairs in which some token is predicted, in order of window, then step
    pairs = np.unique(
        np.stack([np.broadcast_to(np.arange(len(blocks))[:, None], steps.shape)[predicted], steps[predicted]]), axis=1
    )
    window, step = pairs
    shown = position[window]
    if grid.block_size is None:
        until, mine = _shown_until(trace), steps[0][is_response[0]]
        ends = np.array([until[mine == one].max() for one in step])
        shown = np.where(shown < ends[:, None], shown, -1)
    return Views(
        block=blocks[window],
        position=shown,
        masked=((steps[window] >= step[:, None]) | beyond[window]) & (shown >= 0),
        target=predicted[window] & (steps[window] == step[:, None]),
        weight=np.ones((len(window), position.shape[1])),
    )


def split_views(item: Item, budget: int) -> list[Item]:
    """An item whose copies exceed a row, as several items that fit, in order, each with some of the views.

    Under full attention nothing is stored twice for it; in a model of attention blocks each part repeats the prompt and
    as much finished text as its views read. The split is a function of the item and the budget alone.

    Args:
        budget: tokens of a row.

    Returns:
        The item itself if it fits. A view that fits no row with what it reads is an item of its own (`largest_part`).
    """
    if len(item.views.block) < 2 or item.shared_length + item.own_length <= budget:
        return [item]
    clean, ends = _clean_ends(item), np.cumsum(item.views.sizes)
    parts, start = [], 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(clean + ends, budget + before, side="right")))
        parts.append(replace(item, views=item.views.chosen(slice(start, end))))
        start = end
    return parts


def largest_part(item: Item) -> int:
    """Tokens of a row that holds any of the item's views with what it reads: the least budget for `split_views`."""
    return int((_clean_ends(item) + item.views.sizes).max(initial=item.shared_length))


def _clean_ends(item: Item) -> np.ndarray:
    """int64 [n], ascending: `clean_end` of an item whose last view is this one."""
    starts = [item.grid.span(int(block), item.prompt_length, len(item.tokens))[0] for block in item.views.block]
    return np.maximum(np.array(starts, dtype=np.int64) + int(item.views.clean), item.shared_length)


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask of the R tokens behind a prompt: which are hidden, which of those are predicted, bool [R]; and what each
    weighs, float64 [R].
    """

    hidden: np.ndarray
    target: np.ndarray
    weight: np.ndarray


def views_of(prompt_length: int, length: int, grid: Grid, masks: Sequence[Mask]) -> Views:
    """The views of a text under some masks: of each block one for each mask that leaves something to predict there.

    Args:
        prompt_length, length: of the text, R = length - prompt_length; under full attention with what is shown behind
            its last token.
    """
    if length == prompt_length:
        return no_views(grid, length)
    blocks, position = _windows(grid, prompt_length, length)
    is_response = position >= prompt_length
    index = np.where(is_response, position - prompt_length, 0)
    found = []
    for mask in masks:
        hidden = is_response & mask.hidden[index]
        target = hidden & mask.target[index]
        kept = target.any(1)
        found.append((blocks[kept], position[kept], hidden[kept], target[kept], mask.weight[index][kept]))
    columns = [np.concatenate(column) for column in zip(*found)]
    order = np.argsort(columns[0], kind="stable")
    return Views(*(column[order] for column in columns))


def causal_views(first: int, end: int) -> Views:
    """Views for the tokens from position `first` to `end` as an autoregressive model predicts them: for a text on a
    grid of blocks of one token, whatever the blocks of the model.
    """
    position = np.arange(first, end)[:, None]
    nothing, everything = np.zeros(position.shape, dtype=bool), np.ones(position.shape, dtype=bool)
    return Views(position[:, 0], position, nothing, everything, np.ones(position.shape), clean=True)
