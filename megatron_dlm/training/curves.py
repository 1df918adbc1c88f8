"""The picture of a run: what one looks at to see whether it learns, and where its time goes.

`panels` decides what is shown and is plain data; `draw` puts it on paper and is the only place that needs matplotlib.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_dlm.training.history import series

MANY = 60  # points of a curve from which on it is shown smoothed, over a twentieth of them, above its faint self

PHASES = {
    "rollout": "perf/rollout_time",
    "reward": "perf/reward_time",
    "old log-probs": "perf/old_logprobs_time",
    "train": "perf/train_time",
    "refit": "perf/update_weights_time",
    "evaluation": "perf/eval_time",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over steps.

    Attributes:
        kind: 'noisy' may be smoothed, 'exact' may not, 'points' were measured now and then.
    """

    name: str
    steps: list[int]
    values: list[float]
    kind: Literal["noisy", "exact", "points"] = "noisy"


@dataclass(frozen=True, slots=True)
class Panel:
    """What shares an axis.

    Attributes:
        scale: 'zero' starts the axis there, 'log' is for positive values over many magnitudes, 'stack' piles the
            curves up (they then have the same steps).
    """

    title: str
    curves: list[Curve]
    scale: Literal["linear", "zero", "log", "stack"] = "linear"


def panels(records: Sequence[dict]) -> list[Panel]:
    """The panels of a run, without those for which nothing was recorded; none if no training step was recorded.

    Args:
        records: of `read_history`.
    """
    if any("rollout/raw_reward" in record for record in records):
        found = _tracerl(records)
    elif any("train/loss" in record for record in records):
        found = _sft(records)
    else:
        return []
    return [panel for panel in found if panel.curves]


def _sft(records: Sequence[dict]) -> list[Panel]:
    one = functools.partial(_single, records)
    return [
        Panel("loss, nats per token", _curves(records, {"loss": "train/loss", "nll of masked tokens": "train/nll"})),
        one("gradient norm", "train/grad_norm", "zero"),
        Panel("learning rate", _curves(records, {"learning rate": "train/lr"}, kind="exact"), "zero"),
        one("tokens per second", "perf/tokens_per_sec", "zero"),
    ]


def _tracerl(records: Sequence[dict]) -> list[Panel]:
    one = functools.partial(_single, records)
    answers = [*_curves(records, {"rollouts": "rollout/raw_reward"}, factor=100), *_accuracies(records)]
    return [
        Panel("right answers, %", answers, "zero"),
        one("reward", "rollout/reward", "zero"),
        one("tokens per denoising step", "rollout/tokens_per_step"),
        Panel(
            "response length, tokens",
            _curves(records, {"mean": "rollout/response_len/mean", "90th percentile": "rollout/response_len/p90"}),
            "zero",
        ),
        one("entropy of the policy, nats", "train/entropy", "zero"),
        one("k3 between old and new policy", "train/k3", "zero"),
        one("gradient norm", "train/grad_norm", "zero"),
        one("log-prob difference, trainer to rollout", "train/train_rollout_logprob_abs_diff", "log"),
        Panel("seconds per RL step", _phases(records), "stack"),
    ]


def _single(records: Sequence[dict], title: str, name: str, scale: str = "linear") -> Panel:
    return Panel(title, _curves(records, {title: name}), scale)


def _curves(records: Sequence[dict], names: dict[str, str], factor: float = 1.0, kind: str = "noisy") -> list[Curve]:
    found = [Curve(title, *series(records, name, factor), kind) for title, name in names.items()]
    return [curve for curve in found if curve.steps]


def _accuracies(records: Sequence[dict]) -> list[Curve]:
    """The held-out accuracy of each way of unmasking, in percent."""
    names = dict.fromkeys(
        name for record in records for name in record if name.startswith("eval/") and name.endswith("/accuracy")
    )
    return [Curve(f"held out, {name.split('/')[1]}", *series(records, name, 100), "points") for name in names]


def _phases(records: Sequence[dict]) -> list[Curve]:
    """Seconds of each phase of every RL step; 0 where a step had no such phase."""
    steps = [record for record in records if "perf/rollout_time" in record]
    return [
        Curve(title, [record["step"] for record in steps], [float(record.get(name, 0.0)) for record in steps])
        for title, name in PHASES.items()
        if any(name in record for record in steps)
    ]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean over a window around each point, of a twentieth of all points; shorter at the ends. float64 [N]."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))  # symmetric, or the ends would lean inwards
    return (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)


def draw(shown: Sequence[Panel], picture: str | Path, heading: str = "") -> None:
    """Draw panels into a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: nothing global, no window

    columns = min(len(shown), 2 if len(shown) <= 4 else 3)
    rows = -(-len(shown) // columns)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.titlesize": 10, "axes.titlelocation": "left",
             "legend.frameon": False, "legend.fontsize": 8}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for panel, axis in zip(shown, grid.flat):
            _draw_panel(panel, axis)
        for axis in grid.flat[len(shown) :]:
            axis.set_visible(False)
        for axis in grid.flat[max(0, len(shown) - columns) : len(shown)]:
            axis.set_xlabel("step")
        if heading:
            figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(picture, dpi=120, format="png")


def _draw_panel(panel: Panel, axis) -> None:
    axis.set_title(panel.title)
    if panel.scale == "stack":
        _draw_stack(panel.curves, axis)
    else:
        for number, curve in enumerate(panel.curves):
            _draw_curve(curve, axis, f"C{number}")
        values = [value for curve in panel.curves for value in curve.values]
        if panel.scale == "zero" and 0 <= min(values) < max(values):
            axis.set_ylim(0, 1.08 * max(values))
        if panel.scale == "log" and min(values) > 0:
            axis.set_yscale("log")
        else:
            axis.yaxis.set_major_formatter("{x:g}")  # whole numbers: a common factor would stand in the title
        if len(panel.curves) > 1:
            axis.legend(loc="best")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_curve(curve: Curve, axis, colour: str) -> None:
    if curve.kind == "points":
        axis.plot(curve.steps, curve.values, "o--", color=colour, markersize=4.5, linewidth=1.0, label=curve.name)
    elif curve.kind == "exact":
        axis.plot(curve.steps, curve.values, color=colour, linewidth=1.6, label=curve.name)
    elif len(curve.steps) < MANY:
        axis.plot(curve.steps, curve.values, ".-", color=colour, markersize=4.5, linewidth=1.3, label=curve.name)
    else:
        axis.plot(curve.steps, curve.values, color=colour, alpha=0.3, linewidth=0.7)
        axis.plot(curve.steps, smoothed(curve.values), color=colour, linewidth=1.6, label=curve.name)


def _draw_stack(curves: Sequence[Curve], axis) -> None:
    """Steps of one width each: a single one is visible too."""
    steps = np.asarray(curves[0].steps, dtype=np.float64)
    edges = np.stack([steps - 0.5, steps + 0.5], axis=1).reshape(-1)
    heights = [np.repeat(curve.values, 2) for curve in curves]
    axis.stackplot(edges, heights, labels=[curve.name for curve in curves], alpha=0.85, linewidth=0)
    axis.set_ylim(0, 1.25 * max(sum(heights).max(), 1e-9))  # the legend stands above the pile
    axis.legend(loc="upper left", ncols=3, columnspacing=1.2, handlelength=1.2)
