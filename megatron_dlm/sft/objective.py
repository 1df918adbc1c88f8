"""The loss of block SFT, and the items that it is computed on.

    loss = 1/D * sum over hidden response tokens of w(t) * -log p(token | its block's visible tokens, all blocks before)

with t drawn per block, w = min(1/t, max weight), and D the number of response tokens of the whole update: an estimate
of the evidence bound per token (BD3-LM, arXiv 2503.09573, eq. 8). Masks are drawn anew at every step, unless they are
asked to stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.rows import Row
from megatron_dlm.diffusion.views import Item, masked_views
from megatron_dlm.model.head import target_policy
from megatron_dlm.model.policy import Vocabulary


@dataclass(frozen=True, slots=True)
class SFTItems:
    """The items of one update, without samples in which nothing was hidden, and its number of response tokens D."""

    items: list[Item]
    num_tokens: int


def sft_items(
    samples: Sequence[Sample],
    step: int,
    seed: int,
    grid: Grid,
    schedule: MaskSchedule,
    pad_id: int,
    loss_on_pad: bool,
    redraw_masks: bool = True,
) -> SFTItems:
    """Draw the masks of one update. Samples with the same prompt are one group: in a row they share it.

    The last block is filled with pad tokens; they are hidden like others and, with `loss_on_pad`, learned like others.
    Without `redraw_masks` those of a sample depend on the sample and the seed alone.
    """
    items, num_tokens = [], 0
    seen: Counter[str] = Counter()  # a sample that comes twice in an update gets masks of its own each time
    for sample in samples:
        prompt, written = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
        length = padded_length(sample, grid)
        predict_until = length if loss_on_pad else written
        num_tokens += predict_until - prompt
        tokens = np.array([*sample.prompt_ids, *sample.response_ids, *[pad_id] * (length - written)], dtype=np.int64)
        occasion = (step, sample.key, seen[sample.key]) if redraw_masks else (sample.key,)
        views = masked_views(prompt, length, grid, schedule, stream(seed, "sft-mask", *occasion), predict_until)
        seen[sample.key] += 1
        if len(views.block):
            items.append(Item(repr(sample.prompt_ids), tokens, prompt, views, grid))
    return SFTItems(items, num_tokens)


def padded_length(sample: Sample, grid: Grid) -> int:
    """Tokens of a sample whose last block is filled."""
    prompt, written = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
    if grid.block_size is None:
        return written
    return grid.span(grid.block_of(written - 1, prompt), prompt, written + grid.block_size)[1]


def largest_item(sample: Sample, grid: Grid) -> int:
    """Most tokens that a sample can take in a row: its text, and a noisy copy of every block that holds a response
    token.
    """
    length, prompt = padded_length(sample, grid), len(sample.prompt_ids)
    first = grid.span(int(grid.block_of(prompt, prompt)), prompt, length)[0]
    return length if grid.block_size is None else length + (length - first)


def sft_forward(vocabulary: Vocabulary, num_tokens: int, loss_chunk_size: int = 0):
    """forward_step of training/step.py for block SFT; a row's target weights are w(t), divided here by D.

    Args:
        loss_chunk_size: of model/head.py; 0 for a table of the logits of all targets.
    """

    def forward_step(row: Row, model):
        output = model.module.forward_row(row, headless=loss_chunk_size > 0)

        def loss_fn(output: Tensor):
            logprob, _ = target_policy(model.module, output, row.targets.label, 1.0, vocabulary, loss_chunk_size)
            loss = -(row.targets.weight.to(logprob.dtype) * logprob).sum() / num_tokens
            return loss, {"targets": logprob.new_tensor(float(len(logprob))), "nll": -logprob.sum()}

        return output, loss_fn

    return forward_step
