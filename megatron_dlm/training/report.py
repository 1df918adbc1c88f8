"""What a run says: console lines, a progress bar, metrics, samples to read, and a picture at its end.

Metrics are named with the field's prefixes (train/, rollout/, eval/, perf/). Only the main rank speaks; the others call
the same methods and nothing happens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_dlm.config.log import ReportConfig
from megatron_dlm.training.curves import draw, panels
from megatron_dlm.training.history import read_history
from megatron_dlm.training.sinks import JsonLines, MetricsFile, Sink, TensorBoard, WeightsAndBiases


class Report:
    """One per run. Use it as a context manager: at its end it closes what it opened, and draws the curves of the run.

    Args:
        logging: where to.
        is_main: whether this rank speaks.
        settings: the whole configuration, recorded with the run.
        folder: the run's own (--save): metrics.jsonl unless logging names another file, samples.jsonl, curves.png.

    Raises:
        UserError: wandb or tensorboard was asked for and is not there.
    """

    def __init__(
        self, logging: ReportConfig, is_main: bool, settings: Mapping[str, Any], folder: str | Path | None = None
    ) -> None:
        self.is_main = is_main
        self.bar_wanted = logging.progress_bar and is_main and sys.stderr.isatty()
        self.metrics, self.samples, self.picture = _places(logging, folder) if is_main else (None, None, None)
        self.sinks = _open_sinks(logging, self.metrics, settings) if is_main else []
        self.recorded = False

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self.sinks:
            sink.close()
        if self.picture is not None and self.recorded:
            self._draw(self.metrics, self.picture)

    def _draw(self, metrics: Path, picture: Path) -> None:
        """The curves of the whole history. Whatever goes wrong with them costs a line, not the run."""
        try:
            records = read_history(metrics)
            shown = panels(records)
            if not shown:
                return
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw(shown, picture, f"{picture.resolve().parent.name}, {records[-1]['step']} steps")
        except ImportError:
            self.say("No picture of the curves: matplotlib is not installed. Run: pip install matplotlib")
        except Exception as error:
            self.say(f"No picture of the curves: {' '.join(str(error).split()) or type(error).__name__}")
        else:
            self.say(f"Curves: {picture}")

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a step, wherever they are wanted."""
        self.recorded = True
        for sink in self.sinks:
            sink.record(step, metrics)

    def keep_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append to samples.jsonl; nothing happens on a rank or in a run that has none (`samples` is None)."""
        if self.samples is not None:
            with JsonLines(self.samples) as lines:
                for record in records:
                    lines.write(record)

    def iteration(self, step: int, last: int, fields: Mapping[str, float | int | str]) -> None:
        """Megatron's log line; fields in the order given, negative losses included."""
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        shown = " | ".join(f"{name}: {_number(value)}" for name, value in fields.items())
        self.say(f" [{stamp}] iteration {step:8d}/{last:8d} | {shown} |")

    def bar(self, total: int, name: str) -> tqdm:
        """A progress bar on standard error; silent where nobody watches."""
        return tqdm(total=total, desc=name, disable=not self.bar_wanted, leave=False, dynamic_ncols=True)


class Stopwatch:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def _number(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.6E}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
    return str(value)


def _places(logging: ReportConfig, folder: str | Path | None) -> tuple[Path | None, Path | None, Path | None]:
    """The files of metrics, samples and curves."""
    metrics = Path(logging.metrics_jsonl) if logging.metrics_jsonl else None
    if folder is not None:
        folder = Path(folder)
        return metrics or folder / "metrics.jsonl", folder / "samples.jsonl", folder / "curves.png"
    return metrics, None, metrics and metrics.with_suffix(".png")


def _open_sinks(logging: ReportConfig, metrics: Path | None, settings: Mapping[str, Any]) -> list[Sink]:
    sinks: list[Sink] = []
    if logging.tensorboard_dir:
        sinks.append(TensorBoard(logging.tensorboard_dir, settings))
    if logging.wandb_project:
        sinks.append(WeightsAndBiases(logging.wandb_project, logging.wandb_exp_name, logging.wandb_save_dir, settings))
    if metrics is not None:
        sinks.append(MetricsFile(metrics))
    return sinks
