"""How many tests of honest programs a host judges per second, in the sandbox and without it.

    python -m benchmarks.code_sandbox --seconds 5 --workers 1 2

Levels take turns, so that what else the host does meets them alike; the figure to keep is the ratio to `none`, which
forks from the same waiting process but isolates nothing. `interpreter` starts Python anew for each test, as is often
done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from megatron_dlm.rewards.sandbox import confine, isolation
from megatron_dlm.rewards.sandbox.runner import Check, Sandbox
from megatron_dlm.rewards.sandbox.watch import Limits

FUNCTION = "def f(n):\n    return [i for i in range(2, n) if all(i % j for j in range(2, i))]\n"
TEST = Check("assert f(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]")
PROGRAM = "n = int(input())\nprint(sum(int(x) for x in input().split()) * n)\n"
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="time per level and kind of test, over all rounds")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="sandboxes at the same time")
    arguments = parser.parse_args()
    levels = [confine.NONE, *(level for level in confine.LEVELS if isolation.trouble(level) is None)]
    print("| workers | level | function tests/s | of none | stdio tests/s | of none |\n|---|---|---|---|---|---|")
    for workers in arguments.workers:
        rates: dict[str, list[float]] = {name: [0.0, 0.0] for name in [*levels, "interpreter"]}
        for _ in range(ROUNDS):
            for name, both in rates.items():
                for kind in (0, 1):
                    both[kind] += _rate(name, kind, workers, arguments.seconds / ROUNDS) / ROUNDS
        base = rates[confine.NONE]
        for name, (functions, programs) in rates.items():
            print(
                f"| {workers} | {name} | {functions:.0f} | {functions / base[0]:.2f} "
                f"| {programs:.0f} | {programs / base[1]:.2f} |"
            )


def _rate(name: str, kind: int, workers: int, seconds: float) -> float:
    """Tests per second of so many sandboxes together; their start does not count."""
    counts, barrier = [0] * workers, threading.Barrier(workers + 1)

    def work(place: int) -> None:
        with Sandbox(confine.NONE if name == "interpreter" else name, Limits(cpu=5.0)) as sandbox:
            test = _interpreter(kind) if name == "interpreter" else _sandboxed(sandbox, kind)
            for _ in range(3):
                test()
            barrier.wait()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                test()
                counts[place] += 1
            barrier.wait()

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(workers)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.monotonic()
    barrier.wait()
    rate = sum(counts) / (time.monotonic() - started)
    for thread in threads:
        thread.join()
    return rate


def _sandboxed(sandbox: Sandbox, kind: int) -> Callable[[], None]:
    def function() -> None:
        if (word := sandbox.check(FUNCTION, TEST)) != "pass":
            sys.exit(f"an honest program was judged {word!r}")

    def program() -> None:
        if (outcome := sandbox.run(PROGRAM, "2\n1 2 3\n")).output != b"12\n":
            sys.exit(f"an honest program ended as {outcome}")

    return program if kind else function


def _interpreter(kind: int) -> Callable[[], None]:
    text, given = (PROGRAM, "2\n1 2 3\n") if kind else (f"{FUNCTION}{TEST.test}", "")
    command = [sys.executable, "-I", "-c", text]
    return lambda: subprocess.run(command, input=given, text=True, check=True, capture_output=True)


if __name__ == "__main__":
    main()
