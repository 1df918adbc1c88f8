"""Mistakes in what a run is asked to write down about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.profile import Phase, ProfileConfig, TrainingProfileConfig
from megatron_dlm.config.validate import at_least


def check_profile(config: Mapping[str, Any]) -> None:
    """Refuse traces of no step, rank or phase, or without a place. Args: config: section name -> its settings."""
    profile: ProfileConfig = config["profile"]
    at_least(profile, 1, "profile_passes")
    if min(profile.profile_ranks, default=-1) < 0:
        given = " ".join(map(str, profile.profile_ranks)) or "empty"
        raise ConfigError(f"--profile-ranks is {given}. Give ranks, counted from 0.")
    if isinstance(profile, TrainingProfileConfig):
        at_least(profile, 0, "profile_step_start")
        if profile.profile and profile.profile_step_end <= profile.profile_step_start:
            raise ConfigError(
                f"--profile-step-end {profile.profile_step_end} leaves no step to trace after --profile-step-start "
                f"{profile.profile_step_start}. Give a larger one."
            )
        _check_phases(profile, config)
    if profile.profile and place_of_traces(config) is None:
        save = ", or --save" if hasattr(config["checkpoint"], "save") else ""
        raise ConfigError(f"--profile has no place for its traces. Give --profile-dir{save}.")


def _check_phases(profile: TrainingProfileConfig, config: Mapping[str, Any]) -> None:
    """Refuse phases that this run will not have."""
    if not profile.profile or profile.profile_phases is None:
        return
    there = list(get_args(Phase)) if "rl" in config else ["train"]
    if "rl" in config and not config["value"].use_value_model:
        there.remove("train_value")
    if "rl" in config and config["eval"].eval_interval is None:
        there.remove("eval")
    absent = [name for name in profile.profile_phases if name not in there]
    if absent or not profile.profile_phases:
        raise ConfigError(
            f"--profile-phases names {' and '.join(absent) or 'nothing'}, and this run has only {', '.join(there)}. "
            "Give some of these, or leave it out."
        )


def check_profile_here(profile: ProfileConfig, world_size: int, gpu: bool) -> None:
    """Refuse ranks that are not there, and what needs a GPU where there is none."""
    if profile.nvtx_ranges and not gpu:
        raise ConfigError("--nvtx-ranges are for programs that watch a GPU, and there is none. Leave it out.")
    last = max(profile.profile_ranks)
    if profile.profile and last >= world_size:
        raise ConfigError(
            f"--profile-ranks has {last}, and the {world_size} ranks of this job are counted from 0. Give ranks up to "
            f"{world_size - 1}."
        )


def place_of_traces(config: Mapping[str, Any]) -> str | None:
    """The folder for traces."""
    save = getattr(config["checkpoint"], "save", None)
    return config["profile"].profile_dir or (f"{save}/profile" if save else None)
