"""A process that prepares updates ahead of the training, as torch's DataLoader starts it.

    with starting() as processes:
        ...                               # the library starts its worker, which iterates over Prepared(updates)
    with received_from(processes):
        ...                               # the library is asked for the next parcel
    update = opened(buffer, label)
    end(processes)

What it promises (tests/sft/test_loader.py):
  - it ends with the training process, however that ends, and by its order; a SIGTERM or Ctrl-C that reaches the whole
    job leaves it at work, for the step at hand is to be finished and saved;
  - what goes wrong in it is raised where the update would have come: a user's mistake as the same mistake.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from megatron_dlm.config.errors import ResourceError, UserError
from megatron_dlm.sft.parcel import pack, unpack
from megatron_dlm.sft.updates import Update

DEPTH = 2  # updates that are ready before they are asked for
GRACE = 10.0  # seconds in which a process ends by order
_ASKED = {signal.SIGTERM, signal.SIGINT}


@dataclass(frozen=True, slots=True)
class Failure:
    """Comes in the place of an update. mistake: the user's; otherwise `story` is the traceback."""

    mistake: UserError | None
    story: str


class Prepared(IterableDataset):
    """The parcels of updates, without end: after a failure, that failure."""

    def __init__(self, updates: Iterable[Update]) -> None:
        self.updates, self.parent = updates, os.getpid()

    def __iter__(self) -> Iterator[tuple[Tensor, bytes]]:
        if os.getpid() != self.parent:
            _follow(self.parent)
            torch.set_num_threads(1)
        try:
            for update in self.updates:
                yield pack(update)
        except Exception as error:
            parcel = pack(Failure(error if isinstance(error, UserError) else None, traceback.format_exc()))
        while True:
            yield parcel


def opened(buffer: Tensor, label: bytes) -> Update:
    """The update in a parcel.

    Raises:
        UserError: the one that was met in preparing it.
        RuntimeError: whatever else was.
    """
    found = unpack(buffer, label)
    if isinstance(found, Failure):
        raise found.mistake or RuntimeError(f"in the process that prepares rows:\n{found.story}")
    return found


@contextlib.contextmanager
def received_from(processes: list[BaseProcess]) -> Iterator[None]:
    """Around the library's call for the next parcel: whatever it makes of the end of the process is told in a sentence.

    Raises:
        ResourceError: the process has ended, and nobody asked it to.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError):
        for process in processes:
            process.join(1.0)  # its pipes close a little earlier
            if process.exitcode is not None:
                raise ResourceError(
                    "The process that prepares rows ahead was killed, as systems do when memory runs out, or room in "
                    "/dev/shm. Give it more, or do without that process: --num-workers 0."
                ) from None
        raise


@contextlib.contextmanager
def starting() -> Iterator[list[BaseProcess]]:
    """Within it the process is started by a library; the list names it afterwards.

    It starts with signals blocked, as it is to live. What a library does about the death of children is undone: its
    exception could come in the middle of a save.
    """
    found: list[BaseProcess] = []
    before = multiprocessing.active_children()
    resource_tracker.ensure_running()  # at its own start it would let signals through again
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
    try:
        yield found
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main and handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        found += [process for process in multiprocessing.active_children() if process not in before]


def end(processes: list[BaseProcess]) -> None:
    """End those that are still there."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE)
        if process.exitcode is None:
            process.kill()
            process.join()


def _follow(parent: int) -> None:
    """End this process when its parent is gone, or by a SIGTERM that the parent sends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
    atexit.register(os._exit, 0)  # there is nothing to take down that would be worth the time

    def watch() -> None:
        while os.getppid() == parent:
            asked = signal.sigtimedwait({signal.SIGTERM}, 0.5)
            if asked is not None and asked.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
