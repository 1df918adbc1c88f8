"""A child ends with its parent, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import os, subprocess, sys, time
from megatron_dlm.platform.parent import ends_with
child = subprocess.Popen(["sleep", "60"], preexec_fn=ends_with(int(sys.argv[1]) or os.getpid()))
print(child.pid, flush=True)
time.sleep(60)
"""


def has_ended(pid: int, seconds: float = 20) -> bool:
    """Gone, or left to whoever buries the dead."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def start(parent: int = 0) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(parent)], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_child_of_one_that_is_killed() -> None:
    parent, child = start()
    try:
        assert not has_ended(child, 0.3)
        parent.kill()
        assert has_ended(child)
    finally:
        parent.kill()
        parent.wait()
        if not has_ended(child, 0.1):
            os.kill(child, signal.SIGKILL)


def test_a_child_whose_parent_was_gone_before_it_could_ask() -> None:
    """Here the child is told of a parent that it does not have."""
    parent, child = start(parent=1)
    try:
        assert has_ended(child)
    finally:
        parent.kill()
        parent.wait()
