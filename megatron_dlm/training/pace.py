"""When a training run saves, and when it stops before its last step: what all training loops share.

    with Pace(run, save, report.say) as pace:
        while step < last:
            ...
            if pace.after(step):
                break
        pace.finish(step)

SIGTERM (a scheduler that takes the machine back) only sets a mark; the step at hand is finished, saved and then left.
So a save is never cut short by it, and all ranks leave at the same step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
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
        self._previous: object = None

    def __enter__(self) -> Pace:
        self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.terminated = True

    def after(self, step: int) -> bool:
        """Save if a checkpoint is due; whether the run stops here, which is then saved too. Collective."""
        reason = self._reason(step)
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

    def _reason(self, step: int) -> str | None:
        limit, interval = self.run.exit_duration_in_mins, self.run.exit_interval
        minutes = (time.perf_counter() - self.began) / 60
        # Signals and clocks differ between ranks: they decide together.
        terminated, late = anywhere(self.terminated, limit is not None and minutes >= limit)
        if terminated:  # and a signal that came meanwhile is not forgotten: the next step sees it
            self.terminated = True
            return "on SIGTERM"
        if late:
            return f"after {minutes:.1f} minutes"
        if interval is not None and step % interval == 0:
            return f"after --exit-interval {interval}"
        return None
