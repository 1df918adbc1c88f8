"""Two hosts on one machine, for tests: Linux namespaces with a cable between them (tests/multinode/lab.py).

    with two_hosts(folder) as (a, b):
        port = free_port()
        jobs = [host.start(["sft", ...], rank, port) for rank, host in enumerate((a, b))]
        a.cable(up=False)
        assert jobs[1].wait(seconds=60) == 75, jobs[1].said()

Where namespaces are not permitted `two_hosts` raises `Refused`, with the kernel's reason.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.command_server import OF_A_JOB
from tests.multinode.lab import ADDRESSES, NAMES, ROOT

_PORTS = itertools.count(29500)  # a network that nobody else is in has all ports free


class Refused(Exception):
    """This machine does not let this user make such namespaces; the message says why."""


class Lab:
    """The link to the program that is the hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if name not in (*OF_A_JOB, "TMPDIR")}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as a command sets it for itself, before it imports torch
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.multinode.lab", str(folder)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        first = self.process.stdout.readline()
        reason = json.loads(first)["refused"] if first else "the program that makes them has ended"
        if reason is not None:
            self.close()
            raise Refused(reason)

    def ask(self, host: str, op: str, **words: object) -> dict:
        self.process.stdin.write(json.dumps({"host": host, "op": op, **words}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


class Job:
    """A program on a host. `code`: its exit code, None while it runs."""

    def __init__(self, host: Host, pid: int, output: Path) -> None:
        self.host, self.pid, self.output = host, pid, output

    @property
    def code(self) -> int | None:
        return self.host.lab.ask(self.host.name, "poll", pid=self.pid)["code"]

    def said(self) -> str:
        """Standard output and standard error so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code, once it has ended."""
        until(lambda: self.code is not None, seconds, self)
        return self.code

    def wait_for(self, words: str, seconds: float = 300.0) -> None:
        """Until it has said these words."""
        until(lambda: words in self.said() or self.code is not None, seconds, self)
        assert words in self.said(), self.said()


class Host:
    """One of the two. `address`: on the network between them."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name, self.address = lab, name, ADDRESSES[name]
        self._outputs = (lab.folder / f"said-{name}-{number}.txt" for number in itertools.count())

    def start(
        self,
        words: Sequence[object],
        rank: int = 0,
        port: int | None = None,
        world: int = 2,
        per_host: int = 1,
        command: bool = True,
        **environment: str,
    ) -> Job:
        """Start `megatron-dlm words` as one process of a job, with what a launcher says of it.

        Args:
            port: where rank 0, on host-a, is met; None: this is no job of several.
            per_host: processes of it on each host.
            command: False: the words name a program of its own, which gets no variables of a job.
        """
        if port is not None:
            who = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank % per_host, LOCAL_WORLD_SIZE=per_host)
            who |= dict(MASTER_ADDR="host-a", MASTER_PORT=port)
            environment = {name: str(value) for name, value in who.items()} | environment
        output = next(self._outputs)
        answer = self.lab.ask(
            self.name,
            "start",
            words=[str(word) for word in words],
            command=command,
            environment=environment,
            folder=str(self.lab.folder),
            output=str(output),
        )
        return Job(self, answer["pid"], output)

    def torchrun(self, words: Sequence[object], port: int, processes: int = 1, *more: str) -> Job:
        """Start torchrun as one of two hosts, for `python -m megatron_dlm words`."""
        return self.start(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", processes,
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"host-a:{port}", "--rdzv-id", port, *more,
                "-m", "megatron_dlm", *words,
            ],
            command=False,
        )  # fmt: skip

    def kill(self) -> None:
        """End all that runs on this host, without a word."""
        self.lab.ask(self.name, "kill")

    def cable(self, up: bool) -> None:
        """Pull the cable, or plug it in."""
        self.lab.ask(self.name, "link", up=up)


def free_port() -> int:
    return next(_PORTS)


def until(condition, seconds: float, *jobs: Job) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "\n".join(["it did not happen", *(job.said() for job in jobs)])
        time.sleep(0.02)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b, until the end of the context; `folder` is empty and becomes their shared one.

    Raises:
        Refused: not on this machine.
    """
    lab = Lab(folder)
    try:
        yield tuple(Host(lab, name) for name in NAMES)
    finally:
        lab.close()
