"""Does a program do what its tests ask?

The program is the last closed block of Python in the response. Each test runs it anew in a sandbox (rewards/sandbox),
so that nothing which it does in one test reaches another, and its verdict is made outside of it:

  stdio      the words of its standard output are those expected; expected output never enters the sandbox;
  function   assertions run in a second sandbox, and call the program's functions in the first, which answers with
             plain values. A program cannot see, skip or change what judges it: exit(), a swallowed assertion, objects
             that equal everything and patched builtins are failures, or wrong answers.

The share of tests passed is the score; correct is who passes all. Each test has its own limits. A response has a limit,
too, in wall time (`response_limit`): tests that it leaves no time for are timeouts, and so are all tests after the
second timeout, for whoever hangs twice would hang again, and others wait for this verdict. The pool's own limit per
item lies above it, and is met only if this module itself hangs.

This module is imported by the trusted workers of a pool; `prepare` starts the sandboxes before anything is timed.
"""

from __future__ import annotations

import ast
import re
import time

from megatron_dlm.data.code_tasks import STDIO
from megatron_dlm.rewards.base import TIMEOUT, Verdict
from megatron_dlm.rewards.sandbox.programs import FAIL, PASS
from megatron_dlm.rewards.sandbox.runner import Check, Sandbox, SandboxError
from megatron_dlm.rewards.sandbox.watch import Limits

NO_CODE = "no code"
LONGEST_PROGRAM = 1 << 20  # characters
MOST_TIMEOUTS = 2  # of a response's tests; further ones are not run

_FENCE = re.compile(r"^([ \t]*)```[ \t]*([\w+-]*)[^\n`]*$", re.MULTILINE)
_IMPORT = re.compile(r"^(?:import|from)[ \t][^\n]+", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import [^\n(]+\n?", re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")

_sandbox: Sandbox | None = None
_response_limit = 60.0


def prepare(
    level: str = "none",
    cpu: float = 2.0,
    memory: int = 1 << 30,
    output: int = 1 << 20,
    processes: int = 8,
    response_limit: float = 60.0,
    folder: str | None = None,
) -> None:
    """Start this worker's sandboxes.

    Args:
        level: of isolation (rewards/sandbox/confine.py), already found to work.
        cpu, memory, output, processes: limits of one test (rewards/sandbox/watch.py).
        response_limit: seconds of wall time for all tests of a response.
        folder: where sandboxes that need a folder make theirs.
    """
    global _sandbox, _response_limit
    _response_limit = response_limit
    _sandbox = Sandbox(level, Limits(cpu, memory, processes, output), folder=folder)
    _sandbox.start()


def judge(response: str, ground_truth: str, metadata: dict) -> Verdict:
    """Verdict on one response.

    Args:
        response: its whole text.
        ground_truth: not used.
        metadata: that of data/code_tasks.py.
    """
    program = program_of(response, metadata.get("prefix", ""), metadata.get("completes", ""))
    count = len(metadata["tests"])
    if program is None:
        return Verdict(0.0, NO_CODE, 0.0, (NO_CODE,) * count)
    if _sandbox is None:
        raise SandboxError("the sandbox was not prepared")
    wanted = metadata.get("time_limit") or _sandbox.limits.cpu
    end = time.monotonic() + _response_limit
    parts = []
    for test in metadata["tests"]:
        left = end - time.monotonic()
        limits = _sandbox.limits.within(wanted, left)
        if parts and (left <= 1.0 or parts.count(TIMEOUT) >= MOST_TIMEOUTS):
            parts.append(TIMEOUT)
        elif metadata["method"] == STDIO:
            parts.append(_run(program, *test, limits))
        else:
            parts.append(_check(program, test, metadata, limits))
    passed = parts.count(PASS)
    return Verdict(float(passed == count), f"{passed}/{count} tests", passed / count, tuple(parts))


def _run(program: str, given: str, expected: str, limits: Limits) -> str:
    """The word for one test of a whole program."""
    outcome = _sandbox.run(program, given, limits)
    if outcome.word != PASS:
        return outcome.word
    return PASS if outcome.output.decode("utf-8", "replace").split() == expected.split() else FAIL


def _check(program: str, test: str, metadata: dict, limits: Limits) -> str:
    """The word for one test of a program's functions."""
    names = tuple(metadata.get("entries", ()))
    return _sandbox.check(program, Check(test, metadata.get("setup", ""), metadata.get("given", ""), names), limits)


def program_of(response: str, prefix: str = "", completes: str = "") -> str | None:
    """The program in a response, or None.

    Args:
        prefix: what had been put before the response, as its beginning.
        completes: the beginning of a program that the response may go on with, instead of writing it again.
    """
    text = prefix + response
    code = _last_block(text)
    if code is None and completes and not _FENCE.search(text):
        code = completes + response
    elif code is not None and completes:
        code = _completed(completes, code)
    if code is None or not code.strip() or len(code) > LONGEST_PROGRAM:
        return None
    return code


def _last_block(text: str) -> str | None:
    """The last fenced block that closes and calls itself Python, or nothing at all."""
    start, indent, language, found = -1, 0, "", None
    for fence in _FENCE.finditer(text):
        if start >= 0 and not fence[2]:
            if language in _PYTHON:
                found = _without(indent, text[start : fence.start()])
            start = -1
        else:  # a block opens; if there is one before it, that was never closed
            start, indent, language = fence.end() + 1, len(fence[1]), fence[2].lower()
    return found


def _without(indent: int, code: str) -> str:
    """What a block holds whose fence is indented, as in a list: no line has that indentation in the program."""
    return re.sub(rf"^[ \t]{{1,{indent}}}", "", code, flags=re.MULTILINE) if indent else code


def _completed(completes: str, code: str) -> str:
    """A program that was written again from its beginning on, after that beginning, whose imports and helpers are often
    left out. Only the imports are taken of a beginning that is no program by itself."""
    try:
        ast.parse(completes)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        completes = "\n".join(_IMPORT.findall(completes))
    futures = "".join(_FUTURE.findall(code))  # they must stay the first lines
    return futures + (completes.rstrip() + "\n" if completes.strip() else "") + _FUTURE.sub("", code)
