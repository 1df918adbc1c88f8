"""What shares a row does not share anything else: another text in place of a neighbour changes no logit, to the last
bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.sft.updates import sft_items
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.tiny import make_model

SIZES = [(5, 7), (0, 9), (8, 3), (3, 10), (0, 6)]  # of prompts and responses; texts without a prompt are among them
SFT = SFTConfig(data_path=["-"], min_mask_ratio=0.5)  # something of every text is hidden


def texts() -> list[Sample]:
    """The last one answers the question of the first."""
    rng = np.random.default_rng(0)
    made = [
        Sample(f"s{n}", *(tuple(rng.integers(0, 40, size).tolist()) for size in sizes)) for n, sizes in enumerate(SIZES)
    ]
    return [*made, dataclasses.replace(made[0], key="twin", response_ids=(1, 2, 3, 4, 5))]


def logits_of(model, samples: list[Sample], grid: Grid) -> dict[int, torch.Tensor]:
    """Of all texts in one row, by their number: what the model says of their hidden tokens."""
    items = list(enumerate(sft_items(samples, 0, 1, grid, SFT, PAD_ID).items))
    assert len(items) == len(samples)
    row = build_row(items, sum(item.shared_length + item.own_length for _, item in items) + 3, MASK_ID, PAD_ID)
    with torch.no_grad():
        found = model.forward_row(row).cpu()
    return {number: found[row.targets.response == number] for number, _ in items}


@pytest.mark.parametrize("block_size", [4, None], ids=str)
def test_another_text_in_the_row_changes_nothing(block_size: int | None) -> None:
    model = make_model(block_size=block_size or 4, full_attention=block_size is None)
    samples, grid = texts(), Grid(block_size)
    before = logits_of(model, samples, grid)
    assert all(len(found) for found in before.values())
    for changed in range(1, len(samples)):
        others = list(samples)
        old = samples[changed]
        shift = lambda ids: tuple((token + 7) % 40 for token in ids)
        prompt = old.prompt_ids if old.key == "twin" else shift(old.prompt_ids)
        others[changed] = dataclasses.replace(old, prompt_ids=prompt, response_ids=shift(old.response_ids))
        after = logits_of(model, others, grid)
        for number, expected in before.items():
            if number == changed:
                assert not torch.equal(after[number], expected), "the model does not read its text"
            else:
                assert torch.equal(after[number], expected), f"text {number} sees text {changed}"
