"""What cannot work when responses are generated to a file or read from one, refused before anything is built.

The rules of these checks are those of `validate`.
"""

from __future__ import annotations

import os

from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.score import ScoreConfig
from megatron_dlm.config.trace import TraceConfig
from megatron_dlm.config.validate import at_least, check_temperature, within
from megatron_dlm.config.validate_rollout import check_capacity
from megatron_dlm.config.validate_sampling import (
    check_decoding_block,
    check_steps_of_block,
    check_unmasking,
    check_window,
)
from megatron_dlm.config.validate_training import check_stop_tokens


def check_generate(settings: GenerateConfig, checkpoint: LoadConfig) -> None:
    """Refuse settings of `generate` that no model could work with."""
    _files(settings, checkpoint, "prompts")
    at_least(settings, 1, "num_samples")
    check_capacity(settings)
    check_draw(settings)


def check_draw(settings: GenerateConfig) -> None:
    """Refuse sampling that no model could work with."""
    at_least(settings, 1, "max_new_tokens", "rollout_block_size", "denoising_steps")
    check_temperature(settings, "temperature")
    at_least(settings, 0, "top_k", "horizon")
    within(settings, 0, 1, "top_p", low_open=True)
    check_unmasking(settings, [settings.remasking])


def check_draw_of_model(settings: GenerateConfig, model: ModelConfig, vocab_size: int, mask_id: int) -> None:
    """Refuse sampling that does not go with this model. `vocab_size`: number of ids of the tokenizer."""
    block = check_decoding_block(settings.rollout_block_size, model)
    check_steps_of_block(settings.denoising_steps, block, "--denoising-steps")
    check_window(settings, model)
    check_stop_tokens(settings, vocab_size, mask_id)


def check_score(settings: ScoreConfig, checkpoint: LoadConfig, block_size: int | None) -> None:
    """Refuse settings of `score` that cannot work. `block_size`: of the flag, if given."""
    _files(settings, checkpoint, "input")
    check_temperature(settings, "temperature")
    at_least(settings, 1, "max_tokens_per_row")
    if block_size is not None and block_size < 1:
        raise ConfigError(f"--block-size is {block_size}. Use 1 or more.")


def check_trace(settings: TraceConfig, checkpoint: LoadConfig) -> None:
    """Refuse settings of `trace` that no model could work with."""
    _files(settings, checkpoint, "input")
    at_least(settings, 1, "tokens_per_step", "trace_block_size", "canvas_length", "max_tokens_per_row", "lines_at_once")


def check_trace_of_model(settings: TraceConfig, model: ModelConfig) -> int:
    """Refuse settings of `trace` that do not go with this model.

    Returns:
        Tokens of a block that is decoded.
    """
    given = settings.trace_block_size
    if not model.full_attention and settings.canvas_length is not None:
        raise ConfigError(
            f"--canvas-length {settings.canvas_length} is for models of full attention, and this one has blocks of "
            f"{model.block_size}. Leave it out."
        )
    if not model.full_attention and given is not None:
        raise ConfigError(
            f"--trace-block-size {given} is for models of full attention; the blocks of others are those of "
            "--block-size. Leave it out."
        )
    block = given if model.full_attention else model.block_size
    if block is None:
        flag = "--trace-block-size" if model.full_attention else "--block-size"
        raise ConfigError(f"It is not said in which blocks responses are unmasked. Give {flag}.")
    if settings.tokens_per_step > block:
        raise ConfigError(
            f"--tokens-per-step {settings.tokens_per_step} is more than the {block} tokens of a block. "
            f"Use 1 to {block}."
        )
    return block


def _files(settings: GenerateConfig | ScoreConfig | TraceConfig, checkpoint: LoadConfig, source: str) -> None:
    given = getattr(settings, source)
    if checkpoint.load is None and checkpoint.hf_checkpoint is None:
        raise ConfigError("--load is not set. Give the folder of the checkpoint to use, or --hf-checkpoint.")
    if given is None:
        raise ConfigError(f"{flag_name(source)} is not set. Give a JSONL file.")
    if settings.output is None:
        raise ConfigError("--output is not set. Give the JSONL file to write.")
    if os.path.realpath(given) == os.path.realpath(settings.output):
        raise ConfigError(f"--output {settings.output} is the file that {flag_name(source)} names. Give another name.")
