"""One process of a stage: a fresh interpreter, so that all memory of the device is free again when it has ended.

It is a session of its own. Ctrl-C in a terminal therefore reaches the curriculum only, which tells the stage to save
and stop, as SIGTERM does; a second Ctrl-C interrupts the stage as Ctrl-C interrupts any command. A stage never outlives
the process that started it, for another run might go on with its folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Protocol

from megatron_dlm.platform.parent import ends_with

TERM_SECONDS, KILL_SECONDS = 10.0, 40.0  # after another rank's end: asked to leave; made to


class Process(Protocol):
    """What the controller needs of a process at work."""

    def poll(self) -> int | None:
        """Exit code, 128 + N where signal N has ended it; None while it is at work."""

    def send(self, signum: int) -> None: ...


Start = Callable[[Sequence[str], Mapping[str, str]], Process]
"""start(arguments behind `python -m megatron_dlm`, environment)"""


class Child:
    """A process of this machine."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "megatron_dlm", *words],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=ends_with(os.getpid()),
        )

    def poll(self) -> int | None:
        code = self._process.poll()
        if code:  # helpers of one that came to a bad end have nobody left to work for
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return code if code is None or code >= 0 else 128 - code

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signum)


class Signals:
    """SIGTERM and Ctrl-C while stages are at work. Use it as a context manager.

    Attributes:
        stopped: the signal that came first, if any did.
    """

    def __init__(self) -> None:
        self.stopped: int | None = None
        self._pending: list[int] = []
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        again = self.stopped is not None
        self.stopped = self.stopped or signum
        self._pending.append(signal.SIGINT if again and signum == signal.SIGINT else signal.SIGTERM)

    def forward(self, process: Process) -> None:
        """Pass on what has come since."""
        while self._pending:
            process.send(self._pending.pop(0))
