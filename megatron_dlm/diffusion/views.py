"""Which noisy copies of a text a model learns from.

An `Item` is one text of a group together with its views: copies of single blocks in which some tokens are hidden and
some of the hidden ones are predicted. Supervised fine-tuning makes one view per block with freshly drawn masks; TraceRL
makes one per denoising step that the block really took. A view without a predicted token is not made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.trace import Trace, shrink


@dataclass(frozen=True, slots=True)
class Views:
    """n views of one text, each over a window of one attention block (W = block size; the text's length under full
    attention).

    Attributes:
        block: int64 [n], block index.
        position: int64 [n, W], absolute positions, -1 where the block is ragged.
        masked: bool [n, W], tokens shown as the mask token.
        target: bool [n, W], tokens predicted; a subset of `masked`.
        weight: float64 [n, W], weight of each target.
    """

    block: np.ndarray
    position: np.ndarray
    masked: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    @property
    def num_targets(self) -> int:
        return int(self.target.sum())


@dataclass(frozen=True, slots=True)
class Item:
    """One text and its views, ready to be laid out in a row.

    Attributes:
        group: which prompt; items of one group in one row share the prompt's full blocks.
        tokens: int64 [L], prompt, response and the rest of the terminal block.
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
        return max(
            self.grid.span(int(self.views.block[-1]), self.prompt_length, len(self.tokens))[0], self.shared_length
        )

    @property
    def own_length(self) -> int:
        """Tokens that this item adds to a row that already holds its group's prompt; 0 without views."""
        return self.clean_end - self.shared_length + int((self.views.position >= 0).sum())


def _windows(grid: Grid, prompt_length: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that hold a response token, int64 [b], and their positions, int64 [b, W], -1 outside the text."""
    if grid.block_size is None:
        return np.zeros(1, dtype=np.int64), np.arange(length)[None]
    blocks = np.arange(grid.block_of(prompt_length, prompt_length), grid.block_of(length - 1, prompt_length) + 1)
    position = blocks[:, None] * grid.block_size - grid.offset(prompt_length) + np.arange(grid.block_size)
    return blocks, np.where((position >= 0) & (position < length), position, -1)


def _no_views(grid: Grid, length: int) -> Views:
    empty = np.zeros((0, grid.block_size or length))
    whole, truth = empty.astype(np.int64), empty.astype(bool)
    return Views(np.zeros(0, np.int64), whole, truth, truth, empty)


def trace_views(trace: Trace, grid: Grid, shrinkage: int = 1, oldest_version: int = 0) -> Views:
    """One view per block and (shrunk) denoising step, each token predicted in the state in which it was decided.

    The tail after the stop token is hidden in the states in which it was hidden, and never predicted. Nor are tokens
    that weights before `oldest_version` decided; they are context. Weights are 1.

    Source: TraceRL, arXiv 2509.06949, section 4.1.
    """
    prompt, length = len(trace.prompt_ids), len(trace.tokens)
    if length == prompt:  # aborted before its first token
        return _no_views(grid, length)
    blocks, position = _windows(grid, prompt, length)
    is_response = position >= prompt
    steps = np.where(
        is_response, trace.all_steps[np.where(is_response, position - prompt, 0)], 0
    )  # [b, W]; 0 stands for known text
    if shrinkage > 1:
        for row, mine in zip(steps, is_response):
            row[mine] = shrink(row[mine], shrinkage)
    learned = np.append(trace.weight_versions >= oldest_version, np.zeros(len(trace.tail_ids), dtype=bool))
    predicted = is_response & learned[np.where(is_response, position - prompt, 0)]
    if not predicted.any():
        return _no_views(grid, length)
    # (window, step) pairs in which some token is predicted, in order of window, then step
    pairs = np.unique(
        np.stack([np.broadcast_to(np.arange(len(blocks))[:, None], steps.shape)[predicted], steps[predicted]]), axis=1
    )
    window, step = pairs
    return Views(
        block=blocks[window],
        position=position[window],
        masked=steps[window] >= step[:, None],
        target=predicted[window] & (steps[window] == step[:, None]),
        weight=np.ones((len(window), position.shape[1])),
    )


def masked_views(
    prompt_length: int, length: int, grid: Grid, schedule: MaskSchedule, stream: int, predict_until: int
) -> Views:
    """One view per block with masks drawn from the schedule: supervised fine-tuning.

    Args:
        prompt_length, length: of the text.
        stream: keys.stream(...) of this sample at this step.
        predict_until: tokens from this position on (padding of the last block) may be hidden but are not predicted.
    """
    if length == prompt_length:
        return _no_views(grid, length)
    blocks, position = _windows(grid, prompt_length, length)
    response = np.arange(prompt_length, length)
    hidden, weight = schedule.draw(
        stream, torch.from_numpy(response), torch.from_numpy(np.asarray(grid.block_of(response, prompt_length)))
    )
    is_response = position >= prompt_length
    index = np.where(is_response, position - prompt_length, 0)
    masked = is_response & hidden.numpy()[index]
    target = masked & (position < predict_until)
    kept = target.any(1)
    return Views(blocks[kept], position[kept], masked[kept], target[kept], weight.numpy()[index][kept])
