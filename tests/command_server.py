"""Runs commands in forked processes: imports cost seconds, forks do not, and what a command leaves behind in its
process (process groups, signal handlers, environment) cannot reach the next one.

    result = command_server().run(["sft", "--lr", "fast"], folder)

A command has its own exit code, standard output and standard error, as if it had been started by a shell.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness import free_port

ROOT = Path(__file__).resolve().parents[1]
GRACE = 0.2  # seconds between the first failure in a job and the end of its other ranks
OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Result:
    """What the processes of a job left: exit codes by rank (None: it had to be killed), and all that they said."""

    codes: list[int | None]
    stdout: str
    stderr: str


class Server:
    """One process that has imported everything.

    Args:
        module: what is started; it calls `serve`.
    """

    def __init__(self, module: str = "tests.command_server") -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if name not in OF_A_JOB},
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        absent: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        ranks: int = 1,
        limit: float = 300.0,
    ) -> Result:
        """Run one command.

        Args:
            folder: its working directory.
            absent: packages that it cannot import.
            environment: further variables.
            ranks: number of processes of the job; more than one meet as under torchrun.
            limit: seconds after which it is killed.
        """
        order = ["run", list(argv), str(folder), list(absent), dict(environment or {}), ranks, limit]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))

    def start(self, argv: Sequence[str], folder: Path, output: Path) -> Started:
        """Begin a command and do not wait for it.

        Args:
            folder: its working directory.
            output: folder, which is made, for what it says.
        """
        output.mkdir()
        self._process.stdin.write(json.dumps(["start", list(argv), str(folder), str(output)]) + "\n")
        self._process.stdin.flush()
        return Started(self, json.loads(self._process.stdout.readline()), output)

    def wait(self, pid: int, limit: float) -> int | None:
        """Exit code of a command that was begun; None if it is still there after `limit` seconds."""
        self._process.stdin.write(json.dumps(["wait", pid, limit]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@dataclass
class Started:
    """A command at work: `pid` leads a process group and a session of its own."""

    server: Server
    pid: int
    output: Path
    code: int | None = None

    def wait(self, limit: float = 0.0) -> int | None:
        """Exit code, -N where signal N has ended it; None if it is still there after `limit` seconds."""
        if self.code is None:
            self.code = self.server.wait(self.pid, limit)
        return self.code

    def said(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        return (self.output / "stdout").read_text(), (self.output / "stderr").read_text()

    def kill(self) -> None:
        """End it, with its helpers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(300.0)


@functools.cache
def command_server() -> Server:
    """The server of this test session, started when first asked for."""
    server = Server()
    atexit.register(server.close)
    return server


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from megatron_dlm.commands.common import prepare_process

    prepare_process()
    import transformers  # noqa: F401

    for optional in ("matplotlib.pyplot", "reasoning_gym", "wandb", "torch.utils.tensorboard"):
        with contextlib.suppress(ImportError):
            importlib.import_module(optional)
    import megatron_dlm.__main__
    import megatron_dlm.commands.evaluate
    import megatron_dlm.commands.generate
    import megatron_dlm.commands.score
    import megatron_dlm.commands.trace
    import megatron_dlm.evaluation.collect
    import megatron_dlm.evaluation.evaluate
    import megatron_dlm.rl.trainer
    import megatron_dlm.sft.trainer  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        answer = {"run": _job, "start": _start, "wait": _wait_for}[order[0]](*order[1:])
        print(json.dumps(answer), file=answers, flush=True)


def _start(argv: list[str], folder: str, output: str) -> int:
    with open(Path(output) / "stdout", "w") as stdout, open(Path(output) / "stderr", "w") as stderr:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
            _child(argv, folder, [], {}, stdout.fileno(), stderr.fileno())
    while os.getpgid(pid) != pid:  # signals to its group must reach nobody else
        time.sleep(0.001)
    return pid


def _wait_for(pid: int, limit: float) -> int | None:
    deadline = time.monotonic() + limit
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(done[1])


def _job(argv: list[str], folder: str, absent: list[str], environment: dict, ranks: int, limit: float) -> dict:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr, _meeting_place(ranks) as place:
        pids = []
        for rank in range(ranks):
            who = {} if ranks == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), **place}
            pid = os.fork()
            if pid == 0:
                _child(argv, folder, absent, {**who, **environment}, stdout.fileno(), stderr.fileno())
            pids.append(pid)
        codes = _wait(pids, limit)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode("utf-8", "replace"))
    return {"codes": codes, "stdout": said[0], "stderr": said[1]}


def _child(argv: list[str], folder: str, absent: list[str], environment: dict, stdout: int, stderr: int) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment)
        for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), stdout, stderr)):
            os.dup2(source, target)
        for package in absent:
            for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
                del sys.modules[name]
            sys.modules[package] = None
        from megatron_dlm.__main__ import main

        code = main(argv)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], limit: float) -> list[int | None]:
    """Exit codes. When one rank has failed the others are ended soon after, as by torchrun; what is still there at the
    limit is killed, with its helpers."""
    deadline, codes, failed = time.monotonic() + limit, {}, None
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
                failed = failed or (time.monotonic() if codes[pid] else None)
        if failed is not None and time.monotonic() > failed + GRACE:
            failed = float("inf")
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if pid not in codes:
            os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


@contextlib.contextmanager
def _meeting_place(ranks: int) -> Iterator[dict[str, str]]:
    if ranks == 1:
        yield {}
        return
    yield {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


if __name__ == "__main__":
    serve()
