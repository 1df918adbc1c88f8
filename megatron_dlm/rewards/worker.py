"""The inside of a reward worker: read chunks of items, answer item by item.

A worker is a bare interpreter, started by rewards/workers.py with the parent's import path: it imports a judge and what
that judge needs, and neither torch nor the user's program. Nothing here trusts the judge:

  - every answer is sent as soon as it is there, with the time, so that the parent knows which item a silent worker is
    at, and since when;
  - memory is limited (a MemoryError becomes that item's verdict);
  - should the parent die while a judge hangs, a timer ends this process: the default action of SIGALRM needs no
    cooperation of Python code.

Messages to the parent: a float (time at which work starts: ready, or a chunk was received), or (index, verdict, time).
Times are time.monotonic(), which all processes of a Linux host share.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection

from megatron_dlm.rewards.base import CRASH, Judge, Verdict

ORPHAN_FACTOR, ORPHAN_SECONDS = 3, 10.0  # the parent kills at the limit; this timer fires only when there is no parent


def main(descriptor: int, judge_module: str, timeout: float, memory_limit: int, options: dict | None = None) -> None:
    """Serve until the parent closes the pipe.

    Args:
        descriptor: file descriptor of our end of the pipe.
        judge_module: module with `judge`, and optionally `prepare`, which runs before the first item.
        timeout: the parent's limit per item, seconds.
        memory_limit: bytes of address space; 0 for none.
        options: what `prepare` is called with, by name.
    """
    for asked in (signal.SIGINT, signal.SIGTERM):  # they reach the whole job; the parent decides, and closes the pipe
        signal.signal(asked, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pipe = Connection(descriptor)
    module = importlib.import_module(judge_module)
    getattr(module, "prepare", lambda: None)(**(options or {}))
    if memory_limit:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    try:
        pipe.send(time.monotonic())
        while True:
            _serve_chunk(pipe, module.judge, ORPHAN_FACTOR * timeout + ORPHAN_SECONDS)
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone: no clean-up is worth waiting for


def _serve_chunk(pipe: Connection, judge: Judge, orphan_after: float) -> None:
    chunk = pipe.recv()
    pipe.send(time.monotonic())
    for index, item in chunk:
        signal.setitimer(signal.ITIMER_REAL, orphan_after)
        verdict = _guarded(judge, item)
        pipe.send((index, tuple(verdict), time.monotonic()))
    signal.setitimer(signal.ITIMER_REAL, 0)


def _guarded(judge: Judge, item: tuple[str, str, dict]) -> Verdict:
    try:
        return judge(*item)
    except Exception as error:
        return Verdict(0.0, f"{CRASH}: {type(error).__name__}")
    except SystemExit:
        return Verdict(0.0, f"{CRASH}: SystemExit")


if __name__ == "__main__":
    sys.exit("This module is started by megatron_dlm.rewards.workers, not by hand.")
