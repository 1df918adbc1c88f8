"""What a run says: console lines, a progress bar, JSON lines and Weights & Biases.

Metrics are named with the field's prefixes (train/, rollout/, eval/, perf/). Only the main rank speaks; the others call
the same methods and nothing happens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.config.log import LoggingConfig


class Report:
    """One per run. Use it as a context manager: it closes what it opened.

    Args:
        logging: where to.
        is_main: whether this rank speaks.
        settings: the whole configuration, recorded with the run.

    Raises:
        DependencyError: wandb was asked for and is not installed.
    """

    def __init__(self, logging: LoggingConfig, is_main: bool, settings: Mapping[str, Any]) -> None:
        self.is_main = is_main
        self.bar_wanted = logging.progress_bar and is_main and sys.stderr.isatty()
        self.wandb = _open_wandb(logging, settings) if is_main and logging.wandb_project else None
        self.lines = None
        if is_main and logging.metrics_jsonl:
            Path(logging.metrics_jsonl).parent.mkdir(parents=True, exist_ok=True)
            self.lines = open(logging.metrics_jsonl, "a", encoding="utf-8")
        self.started = time.perf_counter()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        if self.wandb is not None:
            self.wandb.finish()
        if self.lines is not None:
            self.lines.close()

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics: a JSON line and a point in Weights & Biases."""
        if self.lines is not None:
            self.lines.write(
                json.dumps({"step": step, "seconds": round(time.perf_counter() - self.started, 3), **metrics}) + "\n"
            )
            self.lines.flush()
        if self.wandb is not None:
            self.wandb.log(dict(metrics), step=step)

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


def _open_wandb(logging: LoggingConfig, settings: Mapping[str, Any]):
    try:
        import wandb
    except ImportError:
        raise DependencyError(
            "--wandb-project needs the wandb package, which is not installed. Run: pip install wandb"
        ) from None
    if logging.wandb_save_dir:
        Path(logging.wandb_save_dir).mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_exp_name,
            dir=logging.wandb_save_dir,
            config=dict(settings),
        )
    except wandb.Error as error:
        reason = (str(error).strip() or "it gives no reason").splitlines()[0].rstrip(".")
        raise ConfigError(
            f"--wandb-project {logging.wandb_project}: Weights & Biases refuses the run ({reason}). "
            "Run wandb login, or set WANDB_MODE=offline."
        ) from None
