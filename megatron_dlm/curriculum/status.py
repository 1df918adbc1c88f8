"""Where a run stands, from its files alone: nothing that is at work is asked, and nothing is disturbed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dlm.curriculum.command_line import METRICS
from megatron_dlm.curriculum.controller import last_metrics
from megatron_dlm.curriculum.plan import Plan
from megatron_dlm.curriculum.progress import End, Visit, following
from megatron_dlm.curriculum.state import read_state, saved_step

_SHOWN = ("eval/", "rollout/raw_reward", "rollout/format_ratio", "train/nll", "train/loss")
"""Metrics of a stage that are worth a place in one line, the most telling first."""
_MOST = 3


def status(plan: Plan) -> str:
    """A table of stages, what gates said, and what comes next.

    Raises:
        UserError: the record of the run is damaged, or of another plan.
    """
    state = read_state(plan.save)
    found, judged = following(plan, state.done)
    stages = {stage.name: stage for stage in plan.stages}
    rows = [("stage", "command", "state", "step", "last metrics")]
    for visit in state.done:
        stage = stages[visit.stage]
        steps = "" if visit.step is None else f"{visit.step}/{stage.last_step}"
        early = visit.step is not None and stage.last_step is not None and visit.step < stage.last_step
        rows.append(
            (visit.folder, stage.command.name, "done early" if early else "done", steps, _metrics(visit.metrics))
        )
    if isinstance(found, Visit):
        begun = state.running == found.folder
        rows.append(_unfinished(found, plan.save) if begun else _to_come(found.stage, found.folder))
        for stage in plan.stages[plan.index(found.stage.name) + 1 :]:
            rows.append(_to_come(stage, stage.name))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    lines += [one.told() for one in judged]
    spent = sum(visit.seconds for visit in state.done)
    finished = f"{len(state.done)} finished (their last starts took {_minutes(spent)})"
    lines.append(f"{plan.save}: {finished}. {_next(found, state.running)}")
    return "\n".join(lines)


def _unfinished(visit: Visit, save: str) -> tuple[str, str, str, str, str]:
    folder, stage = Path(save) / visit.folder, visit.stage
    record = last_metrics(folder)
    saved = saved_step(folder)
    steps = ""
    if stage.command.trains:
        steps = f"{record.get('step', 0)}/{stage.last_step} (saved: {'none' if saved is None else saved})"
    return visit.folder, stage.command.name, f"begun{_age(folder)}", steps, _metrics(record)


def _age(folder: Path) -> str:
    """When a stage last recorded anything."""
    try:
        seconds = max(0.0, time.time() - (folder / METRICS).stat().st_mtime)
    except OSError:
        return ""
    return f", last heard of {_minutes(seconds)} ago"


def _to_come(stage: Any, name: str) -> tuple[str, str, str, str, str]:
    return name, stage.command.name, "to come", "" if stage.last_step is None else f"0/{stage.last_step}", ""


def _metrics(record: Mapping[str, Any]) -> str:
    names = [name for start in _SHOWN for name in record if name.startswith(start) and _telling(name)]
    return ", ".join(f"{name} {record[name]:.4g}" for name in names[:_MOST])


def _telling(name: str) -> bool:
    return not name.startswith("eval/") or name.endswith(("/accuracy", "/response_len"))


def _next(found: Visit | End, running: str | None) -> str:
    if isinstance(found, End):
        return found.problem or "The curriculum is done."
    what = "goes on with" if running == found.folder else "begins"
    return f"The same command without --status {what} {found.folder}."


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
