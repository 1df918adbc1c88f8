"""A sample as it is learned: its tokens on the block grid, and how far they are predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.layout import Grid


@dataclass(frozen=True, slots=True)
class Text:
    """One sample on a grid.

    Attributes:
        sample: where it is from.
        grid: blocks of the model.
        prompt_length: P; tokens before it are given.
        tokens: int64 [L], prompt, response and the pad tokens that fill its last block.
        written: one past the last token of the response.
        until: one past the last token that is predicted.
        length: of what is shown, at least L; under full attention to the end of the canvas.
    """

    sample: Sample
    grid: Grid
    prompt_length: int
    tokens: np.ndarray
    written: int
    until: int
    length: int

    @classmethod
    def of(
        cls,
        sample: Sample,
        grid: Grid,
        pad_id: int,
        loss_on_pad: bool = True,
        noise_prompt: bool = False,
        canvas: int | None = None,
    ) -> Text:
        """Lay a sample out.

        Args:
            noise_prompt: whether the prompt is learned like the response.
            canvas: under full attention, tokens that the response is written on; None for its own length.
        """
        written = len(sample.prompt_ids) + len(sample.response_ids)
        prompt = 0 if noise_prompt else len(sample.prompt_ids)
        filled = padded_length(prompt, written, grid)
        tokens = np.array([*sample.prompt_ids, *sample.response_ids, *[pad_id] * (filled - written)], dtype=np.int64)
        shown = filled
        if grid.block_size is None and canvas is not None:
            shown = max(filled, len(sample.prompt_ids) + canvas)
        return cls(sample, grid, prompt, tokens, written, filled if loss_on_pad else written, shown)

    @property
    def positions(self) -> np.ndarray:
        """int64 [R], of what is shown behind the prompt."""
        return np.arange(self.prompt_length, self.length)

    @property
    def num_predicted(self) -> int:
        """Tokens that are learned if all of them are hidden once."""
        return self.until - self.prompt_length


def padded_length(prompt: int, written: int, grid: Grid) -> int:
    """Tokens of a text of `written` tokens whose last block is filled; prompt: those that are given."""
    if grid.block_size is None:
        return written
    return grid.span(int(grid.block_of(written - 1, prompt)), prompt, written + grid.block_size)[1]
