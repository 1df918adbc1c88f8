"""The command of a stage, exactly as a person would type it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from megatron_dlm.curriculum.plan import Stage
from megatron_dlm.curriculum.progress import Visit
from megatron_dlm.curriculum.state import saved_step

SETTINGS = "stage.yaml"  # file within a stage's folder
METRICS = "metrics.jsonl"


def arguments(visit: Visit, save: str, resumes: bool) -> list[str]:
    """Of a visit, from the name of the command on; its sections are in `SETTINGS` of its folder.

    Args:
        save: folder of the run.
        resumes: whether it goes on from what it has saved itself.
    """
    stage, folder = visit.stage, str(Path(save) / visit.folder)
    words = [*stage.command.name.split(), "--config", str(Path(folder) / SETTINGS)]
    if stage.command.reads_weights:
        words += ["--load", folder] if resumes else _weights(visit, save)
    if stage.command.trains:
        words += ["--save", folder]
    elif "logging" in stage.command.sections:
        words += ["--metrics-jsonl", str(Path(folder) / METRICS)]
    if stage.command.saves_in is not None:
        flag, name = stage.command.saves_in
        words += [flag, str(Path(folder) / name)] if name else [flag, folder]
    if stage.until is not None:
        words += ["--exit-metric", stage.until.metric, "--exit-metric-at-least", repr(stage.until.at_least)]
    if visit.rates is not None:
        words += ["--pass-rates", str(Path(save) / visit.rates)]
    if visit.value is not None:
        words += ["--value-load", str(Path(save) / visit.value)]
    seed = stage.get("run", "seed")
    if visit.round > 1 and seed is not None:  # the same draws again would teach little
        words += ["--seed", str(seed + visit.round - 1)]
    return words


def can_resume(visit: Visit, save: str) -> bool:
    """Whether a visit that was begun has saved anything that it can go on from."""
    return visit.stage.command.trains and saved_step(Path(save) / visit.folder) is not None


def shown(words: list[str]) -> str:
    """For a terminal."""
    return shlex.join(["python", "-m", "megatron_dlm", *words])


def sections(stage: Stage) -> dict[str, dict[str, Any]]:
    """What `SETTINGS` holds."""
    return {section: dict(keys) for section, keys in stage.settings.items()}


def _weights(visit: Visit, save: str) -> list[str]:
    if visit.source is None:
        return list(visit.stage.start)
    words = ["--load", str(Path(save) / visit.source)]
    return [*words, "--finetune"] if visit.stage.command.trains else words
