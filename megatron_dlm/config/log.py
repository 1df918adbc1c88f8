"""What a run reports, how often, and where to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ReportConfig:
    """Where a run reports to."""

    wandb_project: str | None = None
    """Weights & Biases project; metrics are sent only when it is given."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases."""
    wandb_save_dir: str | None = None
    """Folder for the local files of Weights & Biases."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard's event files; they are written only when it is given."""
    progress_bar: bool = True
    """Show a progress bar when the output is a terminal."""
    metrics_jsonl: str | None = None
    """File to which the metrics of every step are appended as a JSON line; in training, metrics.jsonl in --save when it
    is not given."""


@dataclass(slots=True)
class LoggingConfig(ReportConfig):
    """What a training run reports, and where to."""

    log_interval: int = 10
    """Print a line of metrics every so many steps."""
    log_memory: bool = False
    """Print who holds how much memory: after each phase of an RL step, and with the metrics of supervised
    fine-tuning."""
