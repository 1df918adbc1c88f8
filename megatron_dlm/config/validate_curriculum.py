"""Curricula that cannot work, refused before anything is built. The rules of these checks are those of `validate`."""

from __future__ import annotations

from collections import Counter

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.validate import at_least, only_with, within


def check_curriculum(curriculum: CurriculumConfig, rl: RLConfig, rollout: RolloutConfig) -> None:
    """Refuse a curriculum that cannot work with these prompts and this rollout, or parts of it that do nothing."""
    _check_weights(curriculum.prompt_weights, rl.prompt_data)
    at_least(curriculum, 0, "difficulty_floor")
    within(curriculum, 0, 1, "difficulty_momentum", high_open=True)
    at_least(curriculum, 2, "max_sampling_rounds")
    if curriculum.prompt_sampling != "difficulty":
        for name in ("difficulty_floor", "difficulty_momentum", "pass_rates"):
            only_with(curriculum, name, "--prompt-sampling difficulty")
    if not curriculum.dynamic_sampling:
        only_with(curriculum, "max_sampling_rounds", "--dynamic-sampling")
    elif rollout.over_sampling_batch_size is not None:
        raise ConfigError(
            f"--dynamic-sampling and --over-sampling-batch-size {rollout.over_sampling_batch_size} are two ways to "
            "fill a batch: the one asks for more prompts when all responses are judged, the other stops some before "
            "that. Leave one of the two out."
        )


def _check_weights(weights: list[float], sources: list[str]) -> None:
    if not weights:
        return
    if len(weights) != len(sources):
        raise ConfigError(
            f"--prompt-weights has {len(weights)} entries, and --prompt-data {len(sources)}. Give one weight to each "
            "source."
        )
    for weight, source in zip(weights, sources):
        if weight <= 0:
            raise ConfigError(
                f"--prompt-weights gives {source} the weight {weight}. Use weights above 0, or leave the source out."
            )
    source, times = Counter(sources).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"--prompt-data names {source} {times} times, each with a weight. Name it once, with the sum of them."
        )
