"""A benchmark's contestants live in processes of their own, and do what they are told when it is their turn."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """The parent's end of a process.

    Args:
        build: what makes the object whose methods are called there; it and its argument must be picklable. It is made
            at the first order, in a process that has chosen no device yet.
        job: its only argument.
    """

    def __init__(self, build: Callable[[Any], object], job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, job), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method there and wait for what it returns.

        Raises:
            RuntimeError: it raised; the message holds the traceback.
        """
        self._pipe.send((name, arguments))
        good, answer = self._pipe.recv()
        if not good:
            raise RuntimeError(f"the worker failed at {name}:\n{answer}")
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Connection, build: Callable[[Any], object], job: Any) -> None:
    """Answer orders (name of a method, arguments) until the pipe is closed.

    Answers are (True, result) or (False, traceback).
    """
    built = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            built = built or build(job)
            pipe.send((True, getattr(built, name)(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
