"""How each line of a file of prompts is sampled: by the settings of the command, or by its own.

A line may carry `sampling`, an object with any of `FIELDS`; what it names beats the flag of that name. The rules for
its values are those of the flags.
"""

from __future__ import annotations

import dataclasses
import re

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.config.fields import flag_name, from_yaml, one_of, read_fields, suggest
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.validate_generation import check_draw, check_draw_of_model
from megatron_dlm.config.validate_sampling import check_decoding_block
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.diffusion.trace import SamplingParams

FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "max_new_tokens": "max_new_tokens",
    "block_size": "rollout_block_size",
    "denoising_steps": "denoising_steps",
    "remasking": "remasking",
    "threshold": "threshold",
    "confidence": "confidence",
    "entropy_bound": "entropy_bound",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}
"""What a line may say -> the field of `GenerateConfig` that it beats."""


def sampling_params(settings: GenerateConfig, model: ModelConfig, tokenizer: Tokenizer) -> SamplingParams:
    """The settings of the command, complete.

    Raises:
        ConfigError: they do not go with this model.
    """
    check_draw_of_model(settings, model, tokenizer.vocab_size, tokenizer.mask_id)
    block, stops = check_decoding_block(settings.rollout_block_size, model), settings.stop_token_ids
    return SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        block_size=block,
        denoising_steps=settings.denoising_steps or block,
        remasking=settings.remasking,
        threshold=settings.threshold,
        confidence=settings.confidence,
        entropy_bound=settings.entropy_bound,
        stop_token_ids=(tokenizer.eos_id,) if stops is None else tuple(stops),
        ignore_eos=settings.ignore_eos,
        prefix_cache=settings.prefix_cache,
        horizon=settings.horizon,
    )


def sampling_of_line(
    asked: object, where: str, settings: GenerateConfig, model: ModelConfig, tokenizer: Tokenizer
) -> SamplingParams:
    """The same for a line that has settings of its own.

    Args:
        asked: the line's `sampling`, as it stands in the file; None for a line without.
        where: file and line, for the error.

    Raises:
        DataError: it names something unknown, or a value that cannot work.
    """
    if asked is None:
        return sampling_params(settings, model, tokenizer)
    if not isinstance(asked, dict):
        raise DataError(f"{where}: 'sampling' is not an object. Write it as {{\"temperature\": 0.5}}.")
    kinds = {field.name: field.kind for field in read_fields("generate", GenerateConfig)}
    own = {}
    for name, value in asked.items():
        if name not in FIELDS:
            hint = suggest(name, FIELDS, f"Use {one_of(FIELDS)}.")
            raise DataError(f"{where}: 'sampling' holds '{name[:40]}', which is no setting of a line. {hint}")
        try:
            own[FIELDS[name]] = from_yaml(kinds[FIELDS[name]], value, f"'{name}' of 'sampling'")
        except ConfigError as error:
            raise DataError(f"{where}: {error} Correct the line.") from None
    settings = dataclasses.replace(settings, **own)
    try:
        check_draw(settings)
        return sampling_params(settings, model, tokenizer)
    except ConfigError as error:
        raise DataError(f"{where}: what 'sampling' asks for cannot work: {_without_flags(str(error))}") from None


def _without_flags(message: str) -> str:
    """The same sentence about the names that a line has, instead of the flags."""
    names = {flag_name(field): f"'{name}'" for name, field in FIELDS.items()}
    return re.sub(r"--[a-z-]+", lambda match: names.get(match[0], match[0]), message)
