"""What every run has: a seed; and when a training run stops before its last step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RunConfig:
    """The run itself."""

    seed: int = 1234
    """Seed from which every random draw of the run follows."""


@dataclass(slots=True)
class TrainingRunConfig(RunConfig):
    """The run itself, and when it stops before its last step. SIGTERM saves and stops it too."""

    exit_interval: int | None = None
    """Save and stop after a step whose number is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    exit_metric: str | None = None
    """Save and end the run when this metric (eval/dynamic/accuracy, say) has reached --exit-metric-at-least; a run that
    has ended so has nothing left to do."""
    exit_metric_at_least: float | None = None
    """Value of --exit-metric that is enough."""
    dry_run: bool = False
    """Check the settings, print what they come to (those that differ from the defaults, the model's size, the layout,
    the updates of a step), and end. Reads no weights and no data; names the files that are not here."""
    dry_run_world_size: int | None = None
    """Number of processes that --dry-run reckons with; those of the launcher, or as few as the layout needs, when it
    is not given."""
