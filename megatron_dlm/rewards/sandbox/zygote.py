"""The process that waits inside: one fork per program, and an end to all that the program has started.

It has imported what programs mostly import, so that a child starts in a millisecond. It reads orders from one socket:

    {"role": ..., "limits": {...}}   with descriptors: the job (JSON text), then those that become the child's 0, 1, ...
    {"stop": true}                   ends the running child

and answers each job with {"code": exit code, or minus the signal; "cpu": seconds of all its processes}, once no process
of it is left and the scratch folder is empty again. The end of the socket ends the zygote and everything inside.

Nothing here reads a job: only the child does, after the fork, when it has given up all rights.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import site
import socket

from megatron_dlm.rewards.sandbox import confine
from megatron_dlm.rewards.sandbox.programs import FAILED, ROLES, open_streams

_IMPORTED = (
    "abc", "array", "ast", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "math", "operator",
    "queue", "random", "re", "statistics", "string", "struct", "tempfile", "textwrap", "threading", "time", "traceback",
    "typing", "unicodedata", "encodings.utf_8", "encodings.ascii", "encodings.latin_1", "encodings.idna",
)  # fmt: skip
_LARGEST_ORDER = 4096


def main(descriptor: int, level: str, scratch: str) -> None:
    """Serve until the socket ends.

    Args:
        descriptor: our end of a SOCK_SEQPACKET socket.
        level: which isolation (confine.py).
        scratch: folder in which programs start, emptied after each; '' where they can write nothing.
    """
    for name in _IMPORTED:
        importlib.import_module(name)
    site.setquit()
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asked, signal.SIG_IGN)
    orders = socket.socket(fileno=descriptor)
    try:
        user = confine.enter(level)
    except OSError as error:
        orders.send(json.dumps({"refused": str(error)}).encode())
        os._exit(1)
    if scratch:
        os.chdir(scratch)
    gc.freeze()
    orders.send(b'{"ready": true}')
    try:
        while True:
            _serve(orders, level, user, scratch)
    except (EOFError, OSError):
        _end_all(level)
        os._exit(0)


def _serve(orders: socket.socket, level: str, user: int | None, scratch: str) -> None:
    text, descriptors, _, _ = socket.recv_fds(orders, _LARGEST_ORDER, 8)
    if not text:
        raise EOFError
    order = json.loads(text)
    if "stop" in order:
        return  # it came too late: that program had ended
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        _become(order, descriptors, level, user)
    for inherited in descriptors:
        os.close(inherited)
    code = _wait(child, orders)
    _end_all(level)
    if code is None:
        code = -signal.SIGKILL
    if scratch:
        _empty(scratch)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    orders.send(json.dumps({"code": code, "cpu": cpu}).encode())


def _become(order: dict, descriptors: list[int], level: str, user: int | None) -> None:
    """The child, up to the program's first line. Does not return."""
    try:
        os.setsid()
        with os.fdopen(os.dup(descriptors[0]), encoding="utf-8", errors="surrogatepass") as file:
            job = json.load(file)
        moved = [os.dup2(old, 100 + place) for place, old in enumerate(descriptors[1:])]
        for place, old in enumerate(moved):
            os.dup2(old, place)
        os.closerange(len(moved), 4096)
        for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(asked, signal.SIG_DFL)
        open_streams()
        confine.give_up(level, user, order["limits"])
        gc.unfreeze()
        ROLES[order["role"]](job)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(FAILED)


def _wait(child: int, orders: socket.socket) -> int | None:
    """The child's exit code, or None when it is to be ended."""
    process = os.pidfd_open(child)
    try:
        watched = select.poll()
        watched.register(process, select.POLLIN)
        watched.register(orders, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in watched.poll()]
            if process in ready:
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if not orders.recv(_LARGEST_ORDER):
                raise EOFError
            return None  # {"stop": true}
    finally:
        os.close(process)


def _end_all(level: str) -> None:
    """No process but this one is left afterwards."""
    while True:
        if level in (confine.NAMESPACES, confine.BUBBLEWRAP):
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # everybody here, this process excepted
        else:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # orphans are ours, too
        except ChildProcessError:
            return


def _children() -> list[int]:
    path = f"/proc/self/task/{os.getpid()}/children"
    with open(path, encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]


def _empty(scratch: str) -> None:
    """Remove what a program has left. What resists (paths of any length can be built) ends this zygote: whoever waits
    for it starts a fresh one, and the folder goes with the old."""
    try:
        os.chmod(scratch, 0o1777)  # it may belong to whom the program was
        with os.scandir(scratch) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                _unlock(entry.path)
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    except (OSError, RecursionError):
        os._exit(1)


def _unlock(folder: str) -> None:
    """Let this process, which need not be privileged, into a folder and all below."""
    os.chmod(folder, 0o700)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _unlock(entry.path)
