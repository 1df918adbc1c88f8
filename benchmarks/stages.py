"""Commands of the package as the stages of an experiment: each in a folder of its own, several at once, none twice.

A stage leaves `done.json` in its folder when it has ended well: the recipe that it was made by (its command and those
of all stages that it builds on) and how long it took. A stage whose recipe stands there already is not run again, so an
experiment that was interrupted goes on where it stopped, and one with other settings repeats only what they change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
BEGUN, DONE, LOG = "begun", "done.json", "log.txt"  # files of a stage
LAST_LINES = 12  # of the log of a stage that failed


@dataclass(frozen=True, slots=True)
class Stage:
    """A command and the folder of what it writes.

    Attributes:
        name: for people.
        folder: it and everything in it belongs to the stage.
        arguments: of the Python interpreter, run at the top of the checkout.
        after: stages whose results it reads.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    after: tuple[Stage, ...] = ()

    @property
    def recipe(self) -> dict:
        return {"arguments": list(self.arguments), "after": [stage.recipe for stage in self.after]}

    @property
    def metrics(self) -> Path:
        """Where a command of the package is told to write its metrics (`command`)."""
        return self.folder / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """Likewise its checkpoint, or its data."""
        return self.folder / "result"

    @property
    def seconds(self) -> float | None:
        """How long it took; None if it has not been run by this recipe, or did not end well."""
        try:
            done = json.loads((self.folder / DONE).read_text())
        except (OSError, ValueError):
            return None
        return done["seconds"] if done["recipe"] == self.recipe else None


def command(name: str, folder: Path, verb: str, *arguments: object, after: Sequence[Stage] = ()) -> Stage:
    """A stage that is a command of the package, which writes `metrics.jsonl`."""
    words = ("-m", "megatron_dlm", verb, *map(str, arguments), "--metrics-jsonl", str(folder / "metrics.jsonl"))
    return Stage(name, folder, words, tuple(after))


def environment(threads: int, device: str) -> dict[str, str]:
    """Of the stages. Args: threads: of each. device: 'cpu' hides GPUs, 'auto' does not."""
    changes = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        changes["CUDA_VISIBLE_DEVICES"] = ""
    return os.environ | changes


def run(
    stages: Sequence[Stage], at_once: int, variables: dict[str, str], say: Callable[[str], None] = print
) -> list[Stage]:
    """Run what has not been run, in the order given as far as what a stage builds on is there.

    Args:
        stages: all of them, each after those that it builds on.
        at_once: most that run at the same time.

    Returns:
        The stages that failed, and those that were not run because of them.

    Raises:
        ConfigError: a folder is there that no earlier run has made.
    """
    waiting = [stage for stage in stages if stage.seconds is None]
    for stage in waiting:
        if stage.folder.exists() and not (stage.folder / BEGUN).exists():
            raise ConfigError(f"{stage.folder} exists, and no earlier run of this made it. Give another --output.")
    if len(waiting) < len(stages):
        say(f"{len(stages) - len(waiting)} of {len(stages)} stages are there already")
    live: dict[Stage, tuple[subprocess.Popen, float]] = {}
    failed: list[Stage] = []
    try:
        while waiting or live:
            for stage, (process, began) in list(live.items()):
                if process.poll() is not None:
                    del live[stage]
                    _ended(stage, process.returncode, time.monotonic() - began, failed, say)
            for stage in list(waiting):
                if any(one in failed for one in stage.after):
                    waiting.remove(stage)
                    failed.append(stage)
                    say(f"{stage.name}: not run, for what it builds on failed")
            ready = [stage for stage in waiting if all(one not in live and one not in waiting for one in stage.after)]
            for stage in ready[: at_once - len(live)]:
                waiting.remove(stage)
                live[stage] = _start(stage, variables), time.monotonic()
            time.sleep(0.1)
    finally:
        for process, _ in live.values():
            process.terminate()
        for process, _ in live.values():
            process.wait()
    return failed


def _start(stage: Stage, variables: dict[str, str]) -> subprocess.Popen:
    shutil.rmtree(stage.folder, ignore_errors=True)  # of another recipe, or unfinished
    stage.folder.mkdir(parents=True)
    (stage.folder / BEGUN).touch()
    with open(stage.folder / LOG, "w") as log:
        return subprocess.Popen(
            [sys.executable, *stage.arguments], cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
        )


def _ended(stage: Stage, code: int, seconds: float, failed: list[Stage], say: Callable[[str], None]) -> None:
    if code == 0:
        (stage.folder / DONE).write_text(json.dumps({"recipe": stage.recipe, "seconds": seconds}) + "\n")
        say(f"{stage.name}: {seconds:.0f} s")
        return
    failed.append(stage)
    last = (stage.folder / LOG).read_text(errors="replace").splitlines()[-LAST_LINES:]
    say("\n".join([f"{stage.name}: failed with exit code {code}; {stage.folder / LOG} ends with", *last]))
