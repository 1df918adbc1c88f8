"""What is counted of programs that run."""

from __future__ import annotations

import mmap
import os
import select

import pytest

from megatron_dlm.rewards.sandbox import runner
from megatron_dlm.rewards.sandbox.runner import Sandbox, Zygote
from megatron_dlm.rewards.sandbox.watch import BUSY, Job, Limits, resident

SHARES = """
import mmap, os, time
for _ in range(3):
    if os.fork() == 0:
        held = mmap.mmap(-1, 100 << 20)
        for place in range(0, len(held), 4096): held[place] = 1
        time.sleep(60)
time.sleep(60)
"""


def test_shared_memory_counts(level):
    if level == "landlock":
        pytest.skip("with landlock a program is one process")
    with Sandbox(level, Limits(cpu=4.0, memory=256 << 20)) as sandbox:
        assert sandbox.run(SHARES).word == "memory"


@pytest.mark.parametrize("size", [0, 32 << 20])
def test_of_one_process(size):
    """Its own memory and the shared memory that it has touched; a file that it has mapped belongs to nobody."""
    go, ready = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        held = mmap.mmap(-1, size) if size else b""
        own = bytearray(size)
        for place in range(0, size, 4096):
            held[place] = own[place] = 1
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    try:
        assert select.select([ready[0]], [], [], 60)[0]
        found = resident(child)
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (*go, *ready):
            os.close(descriptor)
    assert 2 * size < found < 2 * size + resident(os.getpid()) + (16 << 20)
    assert resident(child) == 0  # it is gone


class Delayed:
    """A zygote whose processes have waited so long for a processor."""

    def __init__(self, seconds):
        self.seconds = seconds

    def delay(self):
        return self.seconds


def test_a_program_is_given_the_time_that_what_it_waits_for_was_kept_waiting():
    limits = Limits(cpu=1.0)
    jobs = [Job(Delayed(3.0), limits, []), Job(Delayed(0.5), limits, [])]
    before = [job.deadline for job in jobs]
    for _ in range(2):  # the second time it is no more
        for job in jobs:
            job.grant_delay(jobs)
    assert [job.deadline - was for job, was in zip(jobs, before)] == pytest.approx([3.5, 3.5])
    jobs[0].zygote.seconds = 1000.0
    jobs[1].grant_delay(jobs)
    assert jobs[1].deadline - before[1] == pytest.approx(BUSY * limits.wall)


def test_the_time_of_children_that_have_ended(monkeypatch):
    """Nobody waits for them where SIGCHLD is ignored."""
    zygote = Zygote.__new__(Zygote)
    zygote.process, zygote._before, zygote._ran = type("P", (), {"pid": 1}), {1: 0.0}, {}
    seen = [{1: 5.0, 7: 0.1, 8: 0.2}, {1: 5.0, 7: 0.3, 9: 0.4}, {1: 5.0, 7: 0.3}]
    totals = []
    for now in seen:
        monkeypatch.setattr(runner, "below", lambda _, now=now: list(now))
        monkeypatch.setattr(runner, "scheduled", lambda pid, now=now: (now[pid], 0.0))
        totals.append(zygote.cpu())
    assert totals == pytest.approx([0.3, 0.3 + 0.2 + 0.4, 0.3 + 0.2 + 0.4])
