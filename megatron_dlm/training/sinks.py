"""Where metrics go besides the console: one class per place, all with `record` and `close`.

A package that a place needs is looked for when it is opened, which is before anything is built; the sentence says what
to install.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_dlm.config.errors import ConfigError, DependencyError


class Sink(Protocol):
    """Takes the metrics of a step. Steps never go back within a run."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """A file to which JSON objects are appended, each readable as soon as it is written. Use it as a context manager,
    or close it.

    A line that a crash cut in the middle is ended first, so that it spoils no other.
    """

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
        self.file = open(path, "a", encoding="utf-8")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class MetricsFile:
    """A JSON line per step, with the seconds since the run was started or resumed."""

    def __init__(self, path: str | Path) -> None:
        self.lines = JsonLines(path)
        self.started = time.perf_counter()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self.lines.write({"step": step, "seconds": round(time.perf_counter() - self.started, 3), **metrics})

    def close(self) -> None:
        self.lines.close()


class WeightsAndBiases:
    """A run in Weights & Biases.

    Raises:
        DependencyError: wandb is not installed.
        ConfigError: Weights & Biases refuses the run.
    """

    def __init__(self, project: str, name: str | None, folder: str | None, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise DependencyError(
                "--wandb-project needs the wandb package, which is not installed. Run: pip install wandb"
            ) from None
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(project=project, name=name, dir=folder, config=dict(settings))
        except wandb.Error as error:
            reason = (str(error).strip() or "it gives no reason").splitlines()[0].rstrip(".")
            raise ConfigError(
                f"--wandb-project {project}: Weights & Biases refuses the run ({reason}). "
                "Run wandb login, or set WANDB_MODE=offline."
            ) from None

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files for TensorBoard: metrics as scalars, the settings as text.

    The file is begun with the first record: from its step on, TensorBoard then hides what an earlier run left in the
    folder, which a resumed run does over again.

    Raises:
        DependencyError: tensorboard is not installed.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise DependencyError(
                "--tensorboard-dir needs the tensorboard package, which is not installed. Run: pip install tensorboard"
            ) from None
        self.open = lambda step: SummaryWriter(folder, purge_step=step, flush_secs=30)
        self.settings = settings
        self.writer: SummaryWriter | None = None

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.writer is None:
            self.writer = self.open(step)
            text = json.dumps(self.settings, indent=2, ensure_ascii=False, default=str)
            self.writer.add_text("settings", f"```json\n{text}\n```", step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
