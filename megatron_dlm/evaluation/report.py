"""Tables and curves from the metrics that runs leave behind (--metrics-jsonl). Imports no model code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_dlm.config.errors import DataError, DependencyError
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.training.curves import draw, panels


def read_metrics(path: Path) -> list[dict]:
    """The metrics of a run, one dict per recorded step."""
    return [record for _, record in read_jsonl(path)]


def minutes_of(path: Path) -> float:
    """How long a run's steps took together, in minutes."""
    return sum(record.get("perf/step_time", 0.0) for record in read_metrics(path)) / 60


def table(rows: Sequence[tuple[str, dict[str, float]]], ways: Sequence[str]) -> str:
    """A table of evaluations: one line per (name, way of unmasking)."""
    width = max(11, *map(len, ways))
    head = (
        f"{'model':24} {'unmasking':{width}} {'accuracy':>9} {'length':>8} "
        f"{'tokens/step':>12} {'tokens/forward':>15} {'cut':>6}"
    )
    lines = [head, "-" * len(head)]
    for name, metrics in rows:
        for way in ways:
            get = lambda key: metrics[f"eval/{way}/{key}"]  # noqa: B023
            lines.append(
                f"{name:24} {way:{width}} {100 * get('accuracy'):8.1f}% {get('response_len'):8.1f} "
                f"{get('tokens_per_step'):12.2f} {get('tokens_per_forward'):15.2f} {100 * get('truncated_ratio'):5.1f}%"
            )
    return "\n".join(lines)


def reward_curve(metrics: Path, picture: Path) -> Path:
    """Draw what training rollouts earned over RL steps; returns the picture's path.

    Raises:
        DependencyError: matplotlib is not installed.
        DataError: the run recorded no rollouts.
    """
    records = [record for record in read_metrics(metrics) if "rollout/raw_reward" in record]
    if not records:
        raise DataError(f"{metrics} records no rollouts. Give the metrics file of a tracerl run.")
    wanted = ("right answers, %", "tokens per denoising step")
    try:
        draw([panel for panel in panels(records) if panel.title in wanted], picture, f"TraceRL, {len(records)} steps")
    except ImportError:
        raise DependencyError(
            "The reward curve needs the matplotlib package, which is not installed. Run: pip install matplotlib"
        ) from None
    return picture
