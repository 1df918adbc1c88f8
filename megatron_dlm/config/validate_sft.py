"""What cannot work in supervised fine-tuning, refused before anything is built.

The rules of these checks are those of `validate`.
"""

from __future__ import annotations

from megatron_dlm.config.block_schedule import FULL, BlockSchedule
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.sft_objective import MASKED, SFTObjectiveConfig, with_objective
from megatron_dlm.config.validate import at_least, fits_positions, needs_data, within

_OF_MASKS = (
    *("mask_ratio_per", "min_mask_ratio", "max_mask_ratio", "max_loss_weight", "mask_draws", "complementary_masks"),
    *("mask_at_least_one", "mask_ratio_warmup_iters", "redraw_masks"),
)


def check_sft(sft: SFTConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse fine-tuning settings that cannot work with this model and layout."""
    needs_data(sft.data_path, "--data-path", "training file")
    at_least(sft, 1, "train_iters", "global_batch_size", "max_tokens_per_row", "seq_length")
    if sft.num_workers not in (None, 0, 1):
        raise ConfigError(
            f"--num-workers is {sft.num_workers}, and rows are prepared in order, by one process beside the training "
            "process or by none. Use 1 or 0."
        )
    _check_objective(sft)
    _check_attention(sft, model)
    if parallel.context_parallel_size > 1 and any(stage.startswith(FULL) for stage in sft.block_size_schedule or ()):
        raise ConfigError(
            f"--context-parallel-size {parallel.context_parallel_size} shares rows out by their blocks, and "
            f"--block-size-schedule has steps of full attention. Leave out one of the two."
        )
    if sft.seq_length is not None:
        fits_positions(sft.seq_length, f"--seq-length {sft.seq_length}", model)


def _check_objective(sft: SFTObjectiveConfig) -> None:
    at_least(sft, 1, "mask_draws", "slice_size", "shrinkage", "canvas_length")
    at_least(sft, 0, "mask_ratio_warmup_iters", "ar_loss_coef", "confidence_coef")
    default = SFTObjectiveConfig()
    for name, objectives in {
        **dict.fromkeys(_OF_MASKS, MASKED),
        "slice_size": ("semi_ar",),
        "shrinkage": ("trace",),
        "confidence_coef": (*MASKED, "trace"),
    }.items():
        value = getattr(sft, name)
        if value != getattr(default, name) and sft.sft_objective not in objectives:
            raise ConfigError(
                f"{flag_name(name)} {value} does nothing with --sft-objective {sft.sft_objective}. Leave it out, or "
                f"use {' or '.join(objectives)}."
            )
    if sft.sft_objective == "ar" and sft.ar_loss_coef:
        raise ConfigError("--ar-loss-coef is for a loss beside the objective, and --sft-objective is ar. Leave it out.")
    if sft.sft_objective == "trace" and sft.noise_prompt:
        raise ConfigError("--noise-prompt has no meaning with --sft-objective trace: a step map knows no prompt.")
    if sft.sft_objective not in MASKED:
        return
    whole = with_objective(sft)
    within(whole, 0, 1, "min_mask_ratio", "max_mask_ratio", low_open=True)
    if whole.min_mask_ratio > whole.max_mask_ratio:
        raise ConfigError(
            f"--min-mask-ratio {whole.min_mask_ratio} is above --max-mask-ratio {whole.max_mask_ratio}. Swap them."
        )
    at_least(whole, 1, "max_loss_weight")  # below 1 even a fully masked block would be cut


def _check_attention(sft: SFTObjectiveConfig, model: ModelConfig) -> None:
    """What goes with full attention only, or with attention blocks only."""
    if model.full_attention:
        if sft.block_size_schedule is not None:
            raise ConfigError(
                "--block-size-schedule ends in blocks of the model's size, and this model has full attention. Leave "
                "out --full-attention and give --block-size; 'full' may be a step of the schedule."
            )
        return
    starts = BlockSchedule.read(sft.block_size_schedule, model.block_size).starts
    if starts and starts[-1] >= sft.train_iters:
        raise ConfigError(
            f"--block-size-schedule comes to its last size after {starts[-1]} steps, and --train-iters is "
            f"{sft.train_iters}. Shorten the schedule, or train longer."
        )
    for name in ("slice_size", "canvas_length"):
        if getattr(sft, name) != getattr(SFTObjectiveConfig(), name):
            raise ConfigError(
                f"{flag_name(name)} {getattr(sft, name)} is for models of full attention, and this one has blocks of "
                f"{model.block_size}. Leave it out."
            )
