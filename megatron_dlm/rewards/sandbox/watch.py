"""Watching programs from outside: what they write, how long they take, how much memory they hold."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_dlm.rewards.base import TIMEOUT
from megatron_dlm.rewards.sandbox.programs import ERROR, EXIT, FAILED, LEFT, OUT_OF_MEMORY, PASS

if TYPE_CHECKING:
    from megatron_dlm.rewards.sandbox.runner import Zygote

MEMORY, OUTPUT, KILLED = "memory", "output", "killed"
BUSY = 4.0  # how many times its wall time a program may wait for a processor
WATCH_EVERY = 0.05  # seconds between looks at the memory of a program's processes


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    Attributes:
        cpu: seconds, for all its processes together.
        memory: bytes of address space for each of its processes, and bytes in use for all of them together.
        processes: processes and threads at a time.
        output: bytes of standard output, and as many of standard error.
    """

    cpu: float = 2.0
    memory: int = 1 << 30
    processes: int = 8
    output: int = 1 << 20

    @property
    def wall(self) -> float:
        """Seconds, not counting those in which it waits for a processor: an end for programs that sleep."""
        return 3.0 * self.cpu + 1.0

    def within(self, cpu: float, wall: float) -> Limits:
        """The same with another CPU time, or less, so that the wall time is not above `wall` seconds."""
        return replace(self, cpu=max(0.01, min(cpu, (wall - 1.0) / 3.0)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Attributes:
        word: 'pass' (ended by itself, without an error), 'error', 'exit', 'timeout', 'memory', 'output' or 'killed'.
        output: what it had written to standard output.
        errors: the same of standard error.
    """

    word: str
    output: bytes
    errors: bytes


class Job:
    """A program that runs: what it has written so far, and until when it may."""

    def __init__(self, zygote: Zygote, limits: Limits, reads: list[int]):
        self.zygote, self.limits, self.reads = zygote, limits, reads
        self.written = {read: bytearray() for read in reads}
        self.deadline = time.monotonic() + limits.wall
        self.late = TIMEOUT  # the reason when the deadline has passed
        self.reason: str | None = None  # why we stopped it
        self._granted = 0.0
        self.ended: dict | None = None
        self.over = False

    def stop(self, reason: str) -> None:
        if not self.over and self.reason is None:
            self.reason = reason
            self.zygote.stop()
            self.deadline = time.monotonic() + 10.0  # for the zygote to clean up

    def grant_delay(self, together: list[Job]) -> None:
        """Put the deadline off by the time that its processes, and those that it waits for, have waited for a
        processor: a busy host is not the program's fault. In all it cannot get more than BUSY times its wall time.

        Args:
            together: this job and those that run with it.
        """
        delay = min(sum(job.zygote.delay() for job in together), BUSY * self.limits.wall)
        if delay > self._granted:
            self.deadline += delay - self._granted
            self._granted = delay

    def dismiss(self, said: bytes) -> None:
        """Nobody needs it any more; but where it has ended by itself, it may say how."""
        if said == EXIT.encode():
            self.deadline, self.late = min(self.deadline, time.monotonic() + 0.5), KILLED
        else:
            self.stop(KILLED)

    def outcome(self) -> Outcome:
        output, errors = (bytes(self.written[read]) for read in self.reads)
        return Outcome(self._word(), output, errors)

    def _word(self) -> str:
        if self.reason is not None:
            return self.reason
        if self.ended is None:
            return KILLED
        code = self.ended["code"]
        if self.ended["cpu"] > self.limits.cpu or code == -signal.SIGXCPU:
            return TIMEOUT
        words = {0: PASS, FAILED: ERROR, OUT_OF_MEMORY: MEMORY, LEFT: EXIT}
        return words.get(code, KILLED if code < 0 else EXIT)


def watch(jobs: list[Job]) -> list[Outcome]:
    """Read what they write until all have ended. When the first of them ends, the others are stopped."""
    look = time.monotonic() + WATCH_EVERY
    with selectors.DefaultSelector() as selector:
        for job in jobs:
            selector.register(job.zygote.socket, selectors.EVENT_READ, (job, None))
            for read in job.reads:
                os.set_blocking(read, False)
                selector.register(read, selectors.EVENT_READ, (job, read))
        while not all(job.over for job in jobs):
            now = time.monotonic()
            for key, _ in selector.select(max(0.0, min(look, *(job.deadline for job in jobs), now + 1.0) - now)):
                job, read = key.data
                if read is not None:
                    if not _read(job, read):
                        selector.unregister(read)
                    continue
                selector.unregister(job.zygote.socket)
                job.ended, job.over = job.zygote.end(), True
                if job is jobs[0]:
                    for other in jobs[1:]:
                        other.dismiss(bytes(job.written[job.reads[0]]))
            now = time.monotonic()
            for job in jobs:
                if not job.over and now > job.deadline and job.reason is None and job.late == TIMEOUT:
                    job.grant_delay(jobs)
                if not job.over and now > job.deadline:
                    if job.reason is not None:  # it does not even answer
                        selector.unregister(job.zygote.socket)
                        job.over = True
                    job.stop(job.late)
            if now >= look:
                look = now + WATCH_EVERY
                for job in jobs:
                    if not job.over and job.zygote.memory() > job.limits.memory:
                        job.stop(MEMORY)
                    if not job.over and job.zygote.cpu() > job.limits.cpu:
                        job.stop(TIMEOUT)
    for job in jobs:
        for read in job.reads:
            while _read(job, read):
                pass
    return [job.outcome() for job in jobs]


def _read(job: Job, read: int) -> bool:
    """Take what is there; False at the end of it."""
    try:
        part = os.read(read, 1 << 16)
    except BlockingIOError:
        return job.over is False
    room = job.limits.output - len(job.written[read])
    job.written[read] += part[:room]
    if len(part) > room:
        if job.over:
            job.reason = job.reason or OUTPUT
            return False
        job.stop(OUTPUT)
    return bool(part)


def below(pid: int) -> list[int]:
    """This process and all its descendants, as far as they can be seen."""
    found = [pid]
    for process in found:
        with contextlib.suppress(OSError), open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:
            found += [int(child) for child in file.read().split()]
    return found


def scheduled(pid: int) -> tuple[float, float]:
    """Seconds that a process has run, and that it has been ready to run and has not."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
        ran, waited = file.read().split()[:2]
        return int(ran) / 1e9, int(waited) / 1e9
    return 0.0, 0.0


def resident(pid: int) -> int:
    """Bytes of a process's memory that no file holds: its own, and shared memory that it has touched."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        lines = (line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:")))
        return sum(int(line[1]) for line in lines) << 10
    return 0
