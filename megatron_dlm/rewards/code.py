"""Does a program do what its tests ask?

The program is the last closed block of Python in the response. Each test runs it anew in a sandbox (rewards/sandbox),
so that nothing which it does in one test reaches another, and its verdict is made outside of it:

  stdio      the words of its standard output are those expected; expected output never enters the sandbox;
  function   assertions run in a second sandbox, and call the program's functions in the first, which answers with
             plain values. A program cannot see, skip or change what judges it: exit(), a swallowed assertion, objects
             that equal everything and patched builtins are failures, or wrong answers.

The share of tests passed is the score; correct is who passes all. Each test has its own limits. A response has a limit,
too, in wall time (`response_limit`): tests that it leaves no time for are timeouts. The pool's own limit per item lies
above it, and is met only if this module itself hangs.

This module is imported by the trusted workers of a pool; `prepare` starts the sandboxes before anything is timed.
"""

from __future__ import annotations

import re
import time

from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.sandbox.programs import FAIL, PASS
from megatron_dlm.rewards.sandbox.runner import Check, Sandbox, SandboxError
from megatron_dlm.rewards.sandbox.watch import TIMEOUT, Limits

STDIO, FUNCTION = "stdio", "function"
NO_CODE = "no code"
LONGEST_PROGRAM = 1 << 20  # characters

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*$", re.MULTILINE)
_IMPORT = re.compile(r"^(?:import|from)[ \t][^\n]+", re.MULTILINE)
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
) -> None:
    """Start this worker's sandboxes.

    Args:
        level: of isolation (rewards/sandbox/confine.py), already found to work.
        cpu, memory, output, processes: limits of one test (rewards/sandbox/watch.py).
        response_limit: seconds of wall time for all tests of a response.
    """
    global _sandbox, _response_limit
    _response_limit = response_limit
    _sandbox = Sandbox(level, Limits(cpu, memory, processes, output))
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
    limits = _sandbox.limits
    if metadata.get("time_limit"):
        limits = limits.within(metadata["time_limit"], _response_limit)
    end = time.monotonic() + _response_limit
    parts = []
    for test in metadata["tests"]:
        if time.monotonic() > end - limits.wall:
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
        code = _imports(completes) + code
    if code is None or not code.strip() or len(code) > LONGEST_PROGRAM:
        return None
    return code


def _last_block(text: str) -> str | None:
    """The last fenced block that closes and calls itself Python, or nothing at all."""
    start, language, found = -1, "", None
    for fence in _FENCE.finditer(text):
        if start < 0:
            start, language = fence.end() + 1, fence.group(1).lower()
        elif not fence.group(1):
            if language in _PYTHON:
                found = text[start : fence.start()]
            start = -1
        else:  # the block before it was never closed
            start, language = fence.end() + 1, fence.group(1).lower()
    return found


def _imports(code: str) -> str:
    """The import statements at the top level of a program's beginning, which who writes it again often leaves out."""
    return "".join(line + "\n" for line in _IMPORT.findall(code))
