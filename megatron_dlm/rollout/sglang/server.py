"""The child's main program: a loop that takes commands from the trainer and drives an engine.

    python -m megatron_dlm.rollout.sglang.server FD FOLDER

runs in SGLang's interpreter, with this package on its path, one end of a socket pair as descriptor FD, and a FOLDER of
its own that it removes when the trainer cannot. Responses are sent as they finish; all other commands are answered one
by one, in order: {"ok": true, ...}, or {"error": "..."}. Generation goes on while the loop waits for the next command,
and stands still while it works on one. When the trainer is gone, so is this process, with everything that it started
and its folder, whatever it is doing.

Commands are read and answers are sent by a thread each. The trainer hands in many requests before it reads an answer:
were the loop to wait until one is read, nobody would read the rest of the requests, and both sides would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Protocol

from megatron_dlm.rollout.sglang.protocol import Closed, Link, Message


class Backend(Protocol):
    """What `serve` drives. `loop` is the event loop on which responses are generated."""

    loop: asyncio.AbstractEventLoop

    def describe(self) -> dict[str, Any]:
        """What the trainer is told at the start."""

    def generate(self, name: str, prompt: list[int], sampling: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Blocks (wire.Block, as plain data) as they are finished."""

    def abort(self, names: list[str]) -> None:
        """End these responses early; their generators end."""

    def call(self, command: str, message: Message) -> dict[str, Any]:
        """Any other command; what it returns goes into the answer."""

    def shutdown(self) -> None:
        """End what it started."""


def serve(link: Link, backend: Backend) -> None:
    """Work until a `stop` comes.

    Raises:
        Closed: the trainer is gone.
    """
    tasks: set[asyncio.Task] = set()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as sender:
        say = lambda answer: sender.submit(_send, link, answer)
        while True:
            message = backend.loop.run_until_complete(_next(link, backend.loop, reader))
            command = message.pop("command")
            if command == "stop":
                say({"ok": True})
                return
            if command == "generate":
                for request in message["requests"]:
                    tasks.add(task := backend.loop.create_task(_respond(say, backend, **request)))
                    task.add_done_callback(tasks.discard)
            elif command == "abort":
                backend.abort(message["names"])
            else:
                say(_answer(backend, command, message))


async def _next(link: Link, loop: asyncio.AbstractEventLoop, reader: ThreadPoolExecutor) -> Message:
    return await loop.run_in_executor(reader, link.receive)


def _send(link: Link, answer: Message) -> None:
    with contextlib.suppress(Closed):  # `serve` will find out
        link.send(answer)


async def _respond(
    say: Callable[[Message], object], backend: Backend, name: str, prompt: list[int], sampling: dict[str, Any]
) -> None:
    blocks = []
    try:
        async for block in backend.generate(name, prompt, sampling):
            blocks.append(block)
        answer = {"name": name, "blocks": blocks}
    except Exception as error:  # the trainer must hear of it, whatever it is
        traceback.print_exc()
        answer = {"name": name, "failed": f"{type(error).__name__}: {error}"}
    say(answer)


def _answer(backend: Backend, command: str, message: Message) -> Message:
    try:
        return {"ok": True} | backend.call(command, message)
    except Closed:
        raise
    except Exception as error:  # as above
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def run(link: Link, folder: Path, make_backend: Callable[[Message], Backend]) -> NoReturn:
    """Start, serve, and end this process. The trainer may be gone at any moment, also before its first word."""
    watcher = _end_with_trainer(link, folder)
    try:
        settings = link.receive()
        try:
            backend = make_backend(settings)
        except Exception as error:  # as above
            traceback.print_exc()
            link.send({"error": f"{type(error).__name__}: {error}"})
            return
        link.send({"ok": True} | backend.describe())
        serve(link, backend)
        backend.shutdown()
    except Closed:
        watcher.join()  # else this process could end before the folder is removed
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the reader may still wait, and SGLang's own threads would too


def _end_with_trainer(link: Link, folder: Path) -> threading.Thread:
    """Watch the other end from a thread; when it closes, remove the folder and kill this process's group."""

    def watch() -> None:
        link.wait_for_end()
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    return watcher


def _make_backend(settings: Message) -> Backend:
    from megatron_dlm.rollout.sglang.backend import SGLangBackend

    return SGLangBackend(settings)


if __name__ == "__main__":
    run(Link.from_fd(int(sys.argv[1])), Path(sys.argv[2]), _make_backend)
