"""Whether samples can be learned as the settings ask, asked before the first of them is."""

from __future__ import annotations

from typing import Protocol

from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.errors import DataError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.validate import fits_positions
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import check_budget
from megatron_dlm.sft.objectives import open_objective
from megatron_dlm.sft.updates import lay_out


class Samples(Protocol):
    """What is known of all samples at once.

    Attributes:
        longest_items: (prompt tokens, response tokens) of the longest of them.
        step_maps: how many have one.
    """

    longest_items: list[tuple[int, int]]
    step_maps: int

    def __len__(self) -> int: ...


def check_samples(samples: Samples, sft: SFTConfig, model: ModelConfig) -> None:
    """Refuse samples that do not fit the rows, the model, or the objective.

    Raises:
        ConfigError: a sample needs more than a row, or more positions than the model has.
        DataError: there are samples without a step map, and the objective learns from it.
    """
    if sft.sft_objective == "trace" and samples.step_maps < len(samples):
        raise DataError(
            f"--sft-objective trace learns from step maps, and {len(samples) - samples.step_maps} of the "
            f"{len(samples)} samples have none. Write them with `megatron-dlm trace`, or choose another objective."
        )
    blocks = BlockSchedule.read(sft.block_size_schedule, model.block_size)
    if sft.canvas_length is not None:
        prompt = max(prompt for prompt, _ in samples.longest_items)
        what = f"--canvas-length {sft.canvas_length} behind a prompt of {prompt} tokens"
        fits_positions(prompt + sft.canvas_length, what, model)
    longest = max(largest_piece(*lengths, sft, blocks) for lengths in samples.longest_items)
    check_budget(longest, sft.max_tokens_per_row)
    fits_positions(longest, f"A sample of {longest} tokens with its last block filled", model)


def largest_piece(prompt: int, response: int, sft: SFTConfig, blocks: BlockSchedule) -> int:
    """Least budget of a row for a text of these lengths: the text with its largest copy. Further copies of it may stand
    in other rows."""
    text, objective, found = Sample("", (0,) * prompt, (0,) * response), open_objective(sft), []
    for size in blocks.sizes:
        one = lay_out(text, objective, Grid(size), sft, 0)
        found.append(len(one.tokens) if one.grid.block_size is not None else one.length)
    return max(found)
