"""What the runs of benchmarks/rl_methods.py say: curves, their ends, their roughness, and intervals over seeds.

Pure functions of metrics that were read back; only `draw` needs matplotlib.

Runs of one seed share data, start and prompts, so methods are compared seed by seed: an interval of a difference is one
of the differences of runs with the same seed. Intervals are those of Student's t over seeds, two-sided, 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dlm.training.history import series

REWARD, ACCURACY = "rollout/raw_reward", "eval/dynamic/accuracy"
END = 0.2  # of a curve: the share of its steps, or of its tokens, over which its end is averaged
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over n values; `half` is half the width of its 95 % interval, None for a single value."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.half is None else f"{self.mean:.1f} ± {self.half:.1f}"

    def signed(self) -> str:
        return ("+" if self.mean >= 0 else "") + str(self)


def interval(values: Sequence[float]) -> Interval:
    """Beyond 15 degrees of freedom the quantile of 15 is used: a little too wide."""
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if n < 2:
        return Interval(float(numbers.mean()), None, n)
    quantile = _T[min(n - 1, len(_T)) - 1]
    return Interval(float(numbers.mean()), float(quantile * numbers.std(ddof=1) / math.sqrt(n)), n)


@dataclass(frozen=True, slots=True)
class Curves:
    """One run.

    Attributes:
        steps, accuracy: RL step and held-out accuracy in percent of each evaluation; the first is at step 0.
        tokens: those trained on up to each evaluation, padding left out.
        reward: right answers of the rollouts of each step, in percent.
        speed: tokens per denoising step of the last rollouts.
        seconds: all RL steps, without evaluation and start.
    """

    steps: np.ndarray
    accuracy: np.ndarray
    tokens: np.ndarray
    reward: np.ndarray
    speed: float
    seconds: float


def curves(records: Sequence[dict]) -> Curves:
    """The curves of a finished run. Args: records: of `read_history`.

    Raises:
        ValueError: a step trained, and does not say on how many tokens.
    """
    steps, accuracy = series(records, ACCURACY, 100)
    if any("train/loss" in record and "train/tokens" not in record for record in records):
        raise ValueError("a step of RL was recorded without train/tokens")
    trained, tokens = series(records, "train/tokens")
    total = np.concatenate([[0.0], np.cumsum(tokens)])
    return Curves(
        steps=np.array(steps),
        accuracy=np.array(accuracy),
        tokens=total[np.searchsorted(trained, steps, side="right")],
        reward=np.array(series(records, REWARD, 100)[1]),
        speed=series(records, "rollout/tokens_per_step")[1][-1],
        seconds=sum(series(records, "perf/step_time")[1]),
    )


def end_of(x: np.ndarray, y: np.ndarray, end: float, share: float = END) -> float:
    """Mean of the piecewise linear curve through (x, y) over the last `share` of 0 ... end.

    A mean over a stretch rather than a last point: single evaluations are noisy. x must not decrease; where `end` is 0
    (nothing was trained on) it is the first point.
    """
    if end == 0:
        return float(y[0])
    begin = end * (1 - share)
    places = np.concatenate([[begin], x[(x > begin) & (x < end)], [end]])
    heights = np.interp(places, x, y)
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(places)).sum() / (end - begin))


def roughness(values: np.ndarray) -> float | None:
    """Standard deviation of the noise of a curve about any slow movement; None of fewer than three points.

    Each point is compared with the middle of its two neighbours. For independent noise of variance v around a straight
    line, that difference has the variance 3/2 v.
    """
    if len(values) < 3:
        return None
    away = values[1:-1] - (values[:-2] + values[2:]) / 2
    return float(np.sqrt(2 / 3 * np.mean(away**2)))


def spread(runs: Sequence[Curves]) -> float | None:
    """How far apart seeds are on their way: the standard deviation over seeds of the gain since step 0, averaged over
    evaluations. Gains, because seeds start from different models. None of a single seed.
    """
    if len(runs) < 2:
        return None
    gains = np.stack([run.accuracy - run.accuracy[0] for run in runs])
    return float(gains[:, 1:].std(0, ddof=1).mean())


def at_equal_tokens(one: Curves, other: Curves) -> tuple[float, float]:
    """Ends of both curves over tokens, at the tokens that the one which trained less has trained on in all."""
    budget = min(one.tokens[-1], other.tokens[-1])
    return end_of(one.tokens, one.accuracy, budget), end_of(other.tokens, other.accuracy, budget)


def end(run: Curves) -> float:
    """Accuracy at the end, over steps."""
    return end_of(run.steps, run.accuracy, float(run.steps[-1]))


Runs = Mapping[str, Mapping[int, Curves]]
"""method -> seed -> its run."""


def pairs(runs: Runs, one: str, other: str) -> list[tuple[Curves, Curves]]:
    """The runs of two methods with the same seeds."""
    return [(runs[one][seed], runs[other][seed]) for seed in sorted(runs[one].keys() & runs[other].keys())]


def tables(runs: Runs, base: str) -> str:
    """Two tables in Markdown: how well each method learns, and how steadily and at what price."""
    learned = [
        (
            *("method", "seeds", "held out before, %", "at the end, %", f"less {base}", "above it in seeds"),
            *(f"less {base} at equal tokens", "above it in seeds", "mean over the run, %"),
        )
    ]
    cost = [
        (
            *("method", "roughness of rollouts", f"less {base}", "roughness held out", f"less {base}"),
            *("spread over seeds", "million tokens trained", "tokens per denoising step", "minutes"),
        )
    ]
    for method, of_seeds in runs.items():
        every = list(of_seeds.values())
        differences = [""] * 4
        if method != base and (both := pairs(runs, method, base)):
            at_steps = [end(mine) - end(theirs) for mine, theirs in both]
            at_tokens = [mine - theirs for mine, theirs in (at_equal_tokens(*pair) for pair in both)]
            differences = [text for values in (at_steps, at_tokens) for text in _difference(values)]
        learned.append(
            (
                *(method, str(len(every)), str(interval([run.accuracy[0] for run in every]))),
                *(str(interval([end(run) for run in every])), *differences),
                str(interval([end_of(run.steps, run.accuracy, float(run.steps[-1]), 1.0) for run in every])),
            )
        )
        apart = spread(every)
        cost.append(
            (
                *(method, *_roughness(runs, method, base, "reward"), *_roughness(runs, method, base, "accuracy")),
                *("" if apart is None else f"{apart:.1f}", f"{np.mean([run.tokens[-1] for run in every]) / 1e6:.2f}"),
                f"{np.mean([run.speed for run in every]):.2f}",
                f"{np.mean([run.seconds for run in every]) / 60:.1f}",
            )
        )
    return markdown(learned) + "\n\n" + markdown(cost)


def _difference(values: Sequence[float]) -> tuple[str, str]:
    """A mean difference with its interval, and in how many seeds it is above 0."""
    return interval(values).signed(), f"{sum(value > 0 for value in values)} of {len(values)}"


def _roughness(runs: Runs, method: str, base: str, curve: str) -> tuple[str, str]:
    """Of one of the curves of all runs; and the mean difference from the base's of the same seed."""
    known = [value for run in runs[method].values() if (value := roughness(getattr(run, curve))) is not None]
    both = (
        []
        if method == base
        else [(roughness(getattr(a, curve)), roughness(getattr(b, curve))) for a, b in pairs(runs, method, base)]
    )
    differences = [mine - theirs for mine, theirs in both if mine is not None and theirs is not None]
    return str(interval(known)) if known else "", interval(differences).signed() if differences else ""


def figures(runs: Runs) -> dict:
    """Everything of the tables run by run, for programs."""
    return {
        method: {
            str(seed): {
                "before": float(run.accuracy[0]),
                "end": end(run),
                "roughness_rollouts": roughness(run.reward),
                "roughness_held_out": roughness(run.accuracy),
                "tokens": float(run.tokens[-1]),
                "tokens_per_step": run.speed,
                "seconds": run.seconds,
            }
            for seed, run in of_seeds.items()
        }
        for method, of_seeds in runs.items()
    }


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head, the first column stands left, the others right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    show = lambda cells: "| " + " | ".join(cells) + " |"
    filled = [
        [cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]
    rule = ["-" * width if n == 0 else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([show(filled[0]), show(rule), *map(show, filled[1:])])


def bands(run_curves: Sequence[tuple[np.ndarray, np.ndarray]], points: int = 100) -> tuple[np.ndarray, ...]:
    """Mean and standard deviation of several curves (x, y), as far as all of them go: x, mean, deviation (0 of one)."""
    last = min(x[-1] for x, _ in run_curves)
    first = max(x[0] for x, _ in run_curves)
    x = np.linspace(first, last, points)
    heights = np.stack([np.interp(x, *curve) for curve in run_curves])
    return x, heights.mean(0), heights.std(0, ddof=1) if len(heights) > 1 else np.zeros(points)


def draw(runs: Runs, path: Path) -> None:
    """The curves of every method, mean and standard deviation over its seeds: over steps, and over trained tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    chosen = {
        ("right answers in rollouts, %", "RL step"): lambda run: (np.arange(1, len(run.reward) + 1), run.reward),
        ("right answers held out, %", "RL step"): lambda run: (run.steps, run.accuracy),
        ("right answers held out, %", "million tokens trained"): lambda run: (run.tokens / 1e6, run.accuracy),
    }
    for axis, ((title, unit), curve) in zip(axes, chosen.items()):
        for method, of_seeds in runs.items():
            x, mean, spread = bands([curve(run) for run in of_seeds.values()])
            (line,) = axis.plot(x, mean, label=f"{method} ({len(of_seeds)} seeds)")
            axis.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel=unit)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
