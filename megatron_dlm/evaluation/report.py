"""Tables and curves from the metrics that runs leave behind (--metrics-jsonl)."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.config.errors import DataError, DependencyError
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.evaluation.evaluate import table

STAGES = (("sft", "SFT"), ("sft-continued", "SFT, as long as TraceRL"), ("tracerl", "SFT + TraceRL"))


def read_metrics(path: Path) -> list[dict]:
    """The metrics of a run, one dict per recorded step."""
    return [record for _, record in read_jsonl(path)]


def minutes_of(path: Path) -> float:
    """How long a run had trained at its last recorded step, in minutes: the sum of its steps."""
    return sum(record["perf/step_time"] for record in read_metrics(path)) / 60


def quickstart_table(folder: Path) -> str:
    """Before and after: one line per stage and way of unmasking, and the gain in points."""
    metrics = {stage: read_metrics(folder / f"eval-{stage}.jsonl")[-1] for stage, _ in STAGES}
    ways = sorted({key.split("/")[1] for key in metrics["sft"] if key.startswith("eval/")})
    count = int(metrics["sft"][f"eval/{ways[0]}/responses"])
    lines = [
        f"{count} held-out problems, temperature 1.0",
        "",
        table([(title, metrics[stage]) for stage, title in STAGES], ways),
        "",
    ]
    for way in ways:
        gain = {
            stage: 100 * (metrics[stage][f"eval/{way}/accuracy"] - metrics["sft"][f"eval/{way}/accuracy"])
            for stage, _ in STAGES
        }
        lines.append(
            f"{way}: TraceRL {gain['tracerl']:+.1f} points; the same {minutes_of(folder / 'tracerl.jsonl'):.1f} minutes of SFT {gain['sft-continued']:+.1f} points"
        )
    return "\n".join(lines)


def reward_curve(metrics: Path, picture: Path) -> Path:
    """Draw the reward of training rollouts over RL steps; returns the picture's path.

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
