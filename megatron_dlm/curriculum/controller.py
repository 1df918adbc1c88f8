"""Runs a plan: one stage after the other, each in fresh processes, until its end or until something stops it.

    with alone(plan.save):                       # rank 0
        Controller(plan, ranks, say).run()

Each rank of a job does the same. Rank 0 alone reads and writes the record (state.py) and decides what comes next
(progress.py); the others hear it. A stage that has saved is gone on with, whatever ended it.

Invariants (tests/curriculum/test_controller.py):
  - a run that is killed at any moment and started again does each stage's steps once, as far as they were saved;
  - when one rank's child fails, those of the others are ended, and all ranks leave with its exit code.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.config import yaml_file
from megatron_dlm.config.errors import TrainingError
from megatron_dlm.curriculum.command_line import METRICS, SETTINGS, arguments, can_resume, sections, shown
from megatron_dlm.curriculum.plan import Plan, Stage
from megatron_dlm.curriculum.process import KILL_SECONDS, TERM_SECONDS, Child, Signals, Start
from megatron_dlm.curriculum.progress import Done, End, Visit, following
from megatron_dlm.curriculum.ranks import Alone, new_part
from megatron_dlm.curriculum.state import State, aside_folder, left_over, read_state, saved_step, write_state
from megatron_dlm.training.history import read_history

_POLL = 0.1  # seconds
_ASK_OTHERS = 1.0
_HURT = 128 + signal.SIGTERM


class Controller:
    """One per process of the job.

    Args:
        say: prints a line; called on rank 0 only.
        start: starts a process of a stage.
    """

    def __init__(self, plan: Plan, ranks: Alone, say: Callable[[str], None] = print, start: Start = Child) -> None:
        self.plan, self.ranks, self.say, self.start = plan, ranks, say, start

    def run(self) -> int:
        """To the end of the plan, or of a stage that does not end well. Collective over the ranks.

        Returns:
            0, or the exit code of the stage that stopped the run (128 + N where signal N did).

        Raises:
            TrainingError: a gate is not passed.
        """
        with Signals() as signals:
            self.ranks.stopped = lambda: signals.stopped
            code, gates = 0, 0
            while True:
                stopped = max(self.ranks.gather(signals.stopped or 0))  # between stages, on any rank
                if stopped:
                    code = 128 + stopped
                    break
                order = self.ranks.decide(lambda: self._next(gates))  # noqa: B023
                gates = order["gates"]
                if "words" not in order:
                    break
                began = time.monotonic()
                codes = self.ranks.gather(self._work(order, signals))
                if any(codes):
                    code = self._broken_off(order, codes)
                    break
                if not self.ranks.decide(lambda: self._finish(time.monotonic() - began)):  # noqa: B023
                    break
            self.ranks.leave()
            return code

    # ---- what rank 0 decides

    def _next(self, gates: int) -> dict[str, Any]:
        """What all ranks do next. `gates`: how many of their verdicts were told already."""
        save, state = self.plan.save, read_state(self.plan.save)
        found, judged = following(self.plan, state.done)
        for one in judged[gates:]:
            self.say(one.told())
        if isinstance(found, End):
            if found.problem is not None:
                raise TrainingError(found.problem)
            self.say(f"The curriculum is done: {_counted(len(state.done), 'stage')} in {save}.")
            return {"gates": len(judged)}
        visit = found
        begun, output = state.running == visit.folder, _output(visit.stage)
        if begun and output is not None and output.exists():  # and a crash came before that was written down
            self._finish(0.0)
            return self._next(len(judged))
        if left_over(save, state, visit.stage.name, visit.round):
            raise TrainingError(
                f"{Path(save) / visit.folder} holds a checkpoint that this run has not written. Move the folder away, "
                "or give save another one."
            )
        if begun:
            _clear(visit, save)
        elif output is not None:
            _make_room(output, state, save, visit.stage.name)
        resumes = can_resume(visit, save)
        state.running = visit.folder
        write_state(save, state)
        _write_settings(visit, save)
        words = arguments(visit, save, resumes)
        self.say(f"{self._heading(visit, resumes)}\n  {shown(words)}")
        return {"gates": len(judged), "words": words, "folder": visit.folder, "part": new_part(visit.folder)}

    def _heading(self, visit: Visit, resumes: bool) -> str:
        place = self.plan.index(visit.stage.name) + 1
        text = f"Stage {place} of {len(self.plan.stages)}: {visit.stage.name} ({visit.stage.command.name})"
        text += f", round {visit.round}" if visit.round > 1 else ""
        if resumes:
            text += f", goes on from step {saved_step(Path(self.plan.save) / visit.folder)}"
        return text + "."

    def _finish(self, seconds: float) -> bool:
        """Write down that a stage is done, if it is; whether the run goes on."""
        save, state = self.plan.save, read_state(self.plan.save)
        visit, _ = following(self.plan, state.done)
        folder = Path(save) / visit.folder
        step = saved_step(folder) if visit.stage.command.trains else None
        metrics = last_metrics(folder, step)
        if not is_complete(visit.stage, step, metrics):
            self.say(
                f"Stage {visit.stage.name} has stopped early, at step {step} of {visit.stage.last_step}. Start the "
                "curriculum again to go on."
            )
            return False
        state.done.append(Done(visit.stage.name, visit.round, visit.stage.identity(), step, metrics, round(seconds, 1)))
        state.running = None
        write_state(save, state)
        return True

    # ---- what every rank does

    def _work(self, order: dict[str, Any], signals: Signals) -> int:
        """Run this rank's process of a stage; returns its exit code."""
        part = order["part"]
        child = self.start(order["words"], self.ranks.environment(part))
        ask, hurt_at, signs = time.monotonic() + _ASK_OTHERS, None, 0
        while (code := child.poll()) is None:
            signals.forward(child)
            now = time.monotonic()
            if hurt_at is None and now > ask:
                ask = now + _ASK_OTHERS
                hurt_at = now if self.ranks.failed(part) is not None else None
            # Its collective operations may wait for one that is gone, and do so for minutes
            for sign, (seconds, signum) in enumerate(((TERM_SECONDS, signal.SIGTERM), (KILL_SECONDS, signal.SIGKILL))):
                if hurt_at is not None and sign == signs and now > hurt_at + seconds:
                    child.send(signum)
                    signs += 1
            time.sleep(_POLL)
        if code:
            self.ranks.fail(part, code)
        return code

    def _broken_off(self, order: dict[str, Any], codes: Sequence[int]) -> int:
        """A stage that did not end well: say so; returns the exit code of the run."""
        rank, code = self.ranks.failed(order["part"]) or next((r, c) for r, c in enumerate(codes) if c)
        if self.ranks.rank == 0:
            folder = Path(self.plan.save) / order["folder"]
            step = saved_step(folder)
            kept = "nothing of it was saved" if step is None else f"it has saved step {step}"
            where = f" on rank {rank}" if len(codes) > 1 else ""
            how = "was stopped" if code == _HURT else f"has ended with exit code {code}{where}"
            self.say(f"Stage {order['folder']} {how}; {kept}. Start the curriculum again to go on from there.")
        return code


def is_complete(stage: Stage, step: int | None, metrics: dict[str, Any]) -> bool:
    """Whether a stage that ended without an error has reached its end. `metrics`: of the last saved step."""
    if not stage.command.trains:
        return True
    if step is None:
        return False
    return step >= (stage.last_step or 0) or (stage.until is not None and stage.until.met(metrics))


def last_metrics(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The numbers recorded last, or of a step; empty where there are none."""
    try:
        records = read_history(folder / METRICS)
    except OSError:
        return {}
    records = [record for record in records if step is None or record["step"] == step]
    return records[-1] if records else {}


def _output(stage: Stage) -> Path | None:
    """The file that is there when the stage has done all its work, if it writes such a one."""
    where = stage.command.complete_at
    path = where and stage.get(*where)
    return Path(path) if path else None


def _make_room(output: Path, state: State, save: str, name: str) -> None:
    """Set aside what an earlier round of a stage has written where the next one is to write; note that the file which
    will be there is this run's.

    Raises:
        TrainingError: another program has written it.
    """
    ours = str(output) in state.outputs
    if output.exists() and not ours:
        raise TrainingError(
            f"Stage {name} is to write {output}, which is there and was not written by this run. Move it away, or give "
            "output another name."
        )
    if output.exists():
        aside = aside_folder(save)
        aside.mkdir(parents=True, exist_ok=True)
        shutil.move(output, aside / output.name)
    if not ours:
        state.outputs.append(str(output))


def _clear(visit: Visit, save: str) -> None:
    """Remove what a stage without steps left half done in its own folder; commands refuse to write into it."""
    if not visit.stage.command.trains and visit.stage.command.saves_in is not None:
        name = visit.stage.command.saves_in[1]
        shutil.rmtree(Path(save) / visit.folder / name if name else Path(save) / visit.folder, ignore_errors=True)


def _write_settings(visit: Visit, save: str) -> None:
    folder = Path(save) / visit.folder
    folder.mkdir(parents=True, exist_ok=True)
    yaml_file.write(sections(visit.stage), folder / SETTINGS)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
