"""When a training run saves, and when it stops before its last step: what all training loops share.

    with Pace(run, save, report.say) as pace:
        while step < last:
            ...
            if pace.after(step, metrics):
                break
        pace.finish(step)

SIGTERM (a scheduler that takes the machine back) only sets a mark; the step at hand is finished, saved and then left.
So a save is never cut short by it, and all ranks leave at the same step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType

from megatron_dlm.config.errors import Interrupted
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.parallel.exchange import anywhere


class Pace:
    """Use it as a context manager around the loop: inside, SIGTERM is caught.

    Args:
        run: when to stop early.
        save: save(step, force) writes a checkpoint when one is due, always with `force`.
        say: prints a line.
    """

    def __init__(
        self, run: TrainingRunConfig, save: Callable[[int, bool], None], say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.run, self.save, self.say = run, save, say
        self.began = time.perf_counter()
        self.terminated = False
        self.reached: dict | None = None  # name, value and step of --exit-metric
        self._previous: object = None

    def __enter__(self) -> Pace:
        self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.terminated = True

    def progress(self) -> dict:
        """What a checkpoint keeps of it: why the run ended, if --exit-metric was the reason."""
        return {} if self.reached is None else {"exit_metric": self.reached}

    def after(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Save if a checkpoint is due; whether the run stops here, which is then saved too. Collective.

        Args:
            metrics: of this step, for --exit-metric.
        """
        reason = self._reason(step, metrics or {})
        self.save(step, reason is not None)
        if reason is not None:
            self.say(f"Stopping {reason}, at step {step}.")
        return reason is not None

    def finish(self, step: int) -> None:
        """Save the end of the run, wherever that is.

        Raises:
            Interrupted: SIGTERM was the reason.
        """
        self.save(step, True)
        if self.terminated:
            raise Interrupted(signal.SIGTERM)

    def _reason(self, step: int, metrics: Mapping[str, float]) -> str | None:
        limit, interval = self.run.exit_duration_in_mins, self.run.exit_interval
        minutes = (time.perf_counter() - self.began) / 60
        # Signals and clocks differ between ranks: they decide together.
        name, enough = self.run.exit_metric, self.run.exit_metric_at_least
        value = None if name is None else metrics.get(name)
        terminated, late, reached = anywhere(
            self.terminated, limit is not None and minutes >= limit, value is not None and value >= enough
        )
        if reached:  # remembered even if the run has another reason to stop
            self.reached = {"metric": name, "value": enough if value is None else max(value, enough), "step": step}
        if terminated:  # and a signal that came meanwhile is not forgotten: the next step sees it
            self.terminated = True
            return "on SIGTERM"
        if reached:
            return f"because {name} has reached {enough:g} ({self.reached['value']:.6g})"
        if late:
            return f"after {minutes:.1f} minutes"
        if interval is not None and step % interval == 0:
            return f"after --exit-interval {interval}"
        return None
