"""What is asked of samples before the first of them is learned."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.views import largest_part
from megatron_dlm.sft.check import check_samples, largest_piece
from megatron_dlm.sft.updates import sft_items
from tests.diffusion.oracles import PAD_ID
from tests.tiny import model_config


@dataclass
class Known:
    longest_items: list[tuple[int, int]] = field(default_factory=lambda: [(5, 20), (9, 3)])
    step_maps: int = 0

    def __len__(self) -> int:
        return 7


def test_steps_are_asked_for_where_they_are_learned() -> None:
    sft = SFTConfig(sft_objective="trace")
    check_samples(Known(step_maps=7), sft, model_config())
    with pytest.raises(DataError, match="4 of the 7 samples have none"):
        check_samples(Known(step_maps=3), sft, model_config())
    check_samples(Known(), SFTConfig(), model_config())


def test_the_longest_sample_has_to_fit_a_row() -> None:
    check_samples(Known(), SFTConfig(max_tokens_per_row=28), model_config())
    with pytest.raises(ConfigError, match="--max-tokens-per-row 27 is too small: one sample may need 28"):
        check_samples(Known(), SFTConfig(max_tokens_per_row=27), model_config())
    with pytest.raises(ConfigError, match="one sample may need 32"):  # in blocks of 8, for a while
        check_samples(Known(), SFTConfig(max_tokens_per_row=30, block_size_schedule=["8:3", "4"]), model_config())


def test_the_last_block_has_to_fit_the_model() -> None:
    check_samples(Known(), SFTConfig(block_size_schedule=["32:3", "4"]), model_config(max_position_embeddings=32))
    with pytest.raises(ConfigError, match="64 positions are needed, and this model has 32"):
        check_samples(Known(), SFTConfig(block_size_schedule=["64:3", "4"]), model_config(max_position_embeddings=32))


def test_the_canvas_has_to_fit_the_model() -> None:
    model = model_config(None, full_attention=True, max_position_embeddings=64)
    check_samples(Known(), SFTConfig(canvas_length=55), model)
    with pytest.raises(ConfigError, match="--canvas-length 56 behind a prompt of 9 tokens"):
        check_samples(Known(), SFTConfig(canvas_length=56), model)


@pytest.mark.parametrize("grid", [Grid(1), Grid(4), Grid(8), Grid(None)], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"sft_objective": "semi_ar"}, {"sft_objective": "trace"}, {"sft_objective": "ar"}], ids=str
)
def test_no_piece_needs_more_than_is_asked_for(grid: Grid, settings: dict) -> None:
    sft, rng = SFTConfig(**settings or {"min_mask_ratio": 1.0}), np.random.default_rng(0)
    for prompt in range(10):
        response = int(rng.integers(1, 20))
        steps = tuple(rng.integers(1, 9, response).tolist())
        sample = Sample("s", (1,) * prompt, (2,) * response, steps)
        items = sft_items([sample], 0, 1, grid, sft, PAD_ID).items
        limit = largest_piece(prompt, response, sft, BlockSchedule((grid.block_size,)))
        assert all(largest_part(item) <= limit for item in items)
        if settings.get("sft_objective") != "semi_ar":  # which may hide nothing of the last block
            assert not items or prompt == 0 or max(largest_part(item) for item in items) == limit
