"""Curves from the metrics that runs leave behind (--metrics-jsonl)."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.config.errors import DataError, DependencyError
from megatron_dlm.data.jsonl import read_jsonl


def read_metrics(path: Path) -> list[dict]:
    """The metrics of a run, one dict per recorded step."""
    return [record for _, record in read_jsonl(path)]


def minutes_of(path: Path) -> float:
    """How long a run's steps took together, in minutes."""
    return sum(record.get("perf/step_time", 0.0) for record in read_metrics(path)) / 60


def reward_curve(metrics: Path, picture: Path) -> Path:
    """Draw what training rollouts earned over RL steps; returns the picture's path.

    Raises:
        DependencyError: matplotlib is not installed.
        DataError: the run recorded no rollouts.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise DependencyError(
            "The reward curve needs the matplotlib package, which is not installed. Run: pip install matplotlib"
        ) from None
    records = [record for record in read_metrics(metrics) if "rollout/raw_reward" in record]
    if not records:
        raise DataError(f"{metrics} records no rollouts. Give the metrics file of a tracerl run.")
    steps = [record["step"] for record in records]
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    top.plot(steps, [100 * record["rollout/raw_reward"] for record in records], marker=".", color="tab:blue")
    top.set_ylabel("right answers in rollouts, %")
    top.set_title("TraceRL")
    bottom.plot(steps, [record["rollout/tokens_per_step"] for record in records], marker=".", color="tab:green")
    bottom.set_ylabel("tokens per denoising step")
    bottom.set_xlabel("RL step")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return picture
