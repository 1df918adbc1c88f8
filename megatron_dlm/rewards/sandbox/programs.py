"""What a child of the zygote does.

    program     a whole program: standard input to standard output
    functions   runs a program and serves its globals to the process that checks them
    checks      one test of a program that runs in another process, in another sandbox

Each ends the process. The exit codes below are for the words in a report; a program that forges one has failed all the
same: only the outside decides that something has passed, from the output of a `program`, or from what `checks` (in
which no line of the program runs) writes.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import importlib
import io
import os
import sys
import threading
import types
from typing import Any, NoReturn

from megatron_dlm.rewards.sandbox.remote import Channel, Gone, Peer, serve

FAILED, OUT_OF_MEMORY, LEFT = 101, 102, 103  # raised, MemoryError, exit()
CHANNEL = 3  # file descriptor between `functions` and `checks`
LARGEST_MESSAGE = 16 << 20
PASS, FAIL, ERROR, EXIT = "pass", "fail", "error", "exit"


def open_streams() -> None:
    """Fresh text streams over descriptors 0 to 2: those of the zygote have its buffers."""
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def run_program(job: dict) -> NoReturn:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv[:] = ["program.py"]
    code = 0
    try:
        try:
            _execute(job["text"], "program.py", module.__dict__)
        finally:  # what an interpreter does before it ends
            threading._shutdown()
            atexit._run_exitfuncs()
    except SystemExit as left:
        code = 0 if left.code in (None, 0) else LEFT
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException as error:
        code = _tell(error)
    try:
        sys.stdout.flush()
    except BaseException:
        code = code or FAILED
    os._exit(code)


def run_functions(job: dict) -> NoReturn:
    module = types.ModuleType("solution")  # not __main__: a program's own demonstration does not run
    sys.modules["solution"] = module
    sys.argv[:] = ["solution.py"]
    try:
        _execute(job["text"], "solution.py", module.__dict__)
        serve(Channel(CHANNEL, LARGEST_MESSAGE), module.__dict__)
    except Gone:
        os._exit(0)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (SystemExit, KeyboardInterrupt):
        os._exit(LEFT)
    except BaseException as error:
        os._exit(_tell(error))
    os._exit(LEFT)


def run_checks(job: dict) -> NoReturn:
    """Writes one word to descriptor 1: pass, fail, error, or exit when the program was gone."""
    sys.stdout = sys.stderr = _Nowhere()
    peer = Peer(Channel(CHANNEL, LARGEST_MESSAGE))
    try:
        _check(job, peer)
        word = EXIT if peer.gone else PASS
    except Gone:
        word = EXIT
    except AssertionError:
        word = FAIL
    except BaseException:
        word = ERROR
    if peer.gone:
        word = EXIT
    os.write(1, word.encode())
    os._exit(0)


def _execute(text: str, name: str, names: dict[str, Any]) -> None:
    """Run a program of others: without the __future__ of this module, which would change what it means."""
    exec(compile(text, name, "exec", dont_inherit=True), names)


ROLES = {"program": run_program, "functions": run_functions, "checks": run_checks}


class _Nowhere(io.TextIOBase):
    """What a test prints is of no interest, and descriptor 1 is for the verdict."""

    def write(self, text: str) -> int:
        return len(text)


def _check(job: dict, peer: Peer) -> None:
    names: dict[str, Any] = {"__name__": "tests"}
    _execute(job["given"], "given.py", names)
    text = job["setup"] + "\n" + job["test"]
    for name in sorted(_free_names(text)):
        if name in job["entries"] or name not in names:
            _bind(name, names, job, peer, text)
    _execute(job["setup"], "setup.py", names)
    _execute(job["test"], "test.py", names)


def _bind(name: str, names: dict, job: dict, peer: Peer, text: str) -> None:
    """What a test means by a name that it does not define.

    The program under test must not supply what judges it: what the language or the standard library has under that
    name comes from there, unless it is what the test is about.
    """
    if name not in job["entries"]:
        if hasattr(builtins, name):
            return
        if name in job["common"]:
            names[name] = getattr(importlib.import_module(job["common"][name]), name)
            return
        if name in sys.stdlib_module_names and not _is_called(name, text):
            names[name] = importlib.import_module(name)
            return
    try:
        names[name] = peer.get(name)
    except NameError:
        names.pop(name, None)  # the test raises it where it uses the name, for which nothing else may stand in
        names["__builtins__"] = {key: value for key, value in vars(builtins).items() if key not in job["entries"]}


def _free_names(text: str) -> set[str]:
    loaded, bound = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return loaded - bound


def _is_called(name: str, text: str) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        for node in ast.walk(ast.parse(text))
    )


def _tell(error: BaseException) -> int:
    """A line for whoever reads the output, and the exit code."""
    try:
        sys.stderr.write(f"{type(error).__name__}: {error}"[:2000] + "\n")
        sys.stderr.flush()
    except BaseException:
        pass  # the exit code says enough
    return FAILED
