"""The outside of the sandbox: start zygotes, give them programs, watch, stop.

    with Sandbox("namespaces", Limits()) as sandbox:
        outcome = sandbox.run("print(input())", "hello")
        word = sandbox.check("def f(x): ...", Check("assert f(1) == 2"))

The output of a program is read while it runs, and the program is stopped when there is too much of it, when its time
is over, or when all its processes together hold too much memory. Time counts from the moment it is handed over to a
process that is ready: CPU time is the program's own, wall time a multiple of it for whoever sleeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace

from megatron_dlm.data.code_tasks import COMMON
from megatron_dlm.rewards.sandbox import boot, confine
from megatron_dlm.rewards.sandbox.programs import ERROR, EXIT, FAIL, PASS
from megatron_dlm.rewards.sandbox.watch import KILLED, Job, Limits, Outcome, below, resident, scheduled, watch

START_LIMIT = 60.0  # seconds until a zygote is ready
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
CHECKS_CPU = 2.0  # seconds that a test's own code may take beyond the time of the program


@dataclass(frozen=True, slots=True)
class Check:
    """One test of a program's functions.

    Attributes:
        test: Python code that raises AssertionError, or another exception, unless the program is right.
        setup: code before it.
        given: trusted code that defines names which tests use besides the program's.
        entries: names that mean the program's own, even where the language or `given` has them.
    """

    test: str
    setup: str = ""
    given: str = ""
    entries: tuple[str, ...] = ()


class SandboxError(RuntimeError):
    """The sandbox itself did not start; the message says why."""


class Sandbox:
    """Runs programs, one at a time. Not to be used from two threads at once."""

    def __init__(
        self, level: str, limits: Limits | None = None, bubblewrap: str | None = None, folder: str | None = None
    ):
        """Zygotes start when they are first needed (`start` does it now).

        Args:
            level: 'bubblewrap', 'namespaces', 'landlock' or 'none' (confine.py).
            bubblewrap: the bwrap program; None looks for it.
            folder: where the working folders of levels without a file system of their own are made; None: where
                temporary files are.
        """
        self.level, self.limits, self._folder = level, limits or Limits(), folder
        self._bubblewrap = bubblewrap or shutil.which("bwrap") or "bwrap"
        self._zygotes: dict[str, Zygote] = {}

    def start(self) -> None:
        """Make both zygotes ready. Raises SandboxError."""
        for side in ("programs", "checks"):
            self._zygote(side)

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        """Run a whole program with this text as its standard input."""
        limits = limits or self.limits
        with contextlib.ExitStack() as stack:
            job = self._start("programs", "program", {"text": program}, limits, stack, stdin)
            return watch([job])[0]

    def check(self, program: str, check: Check, limits: Limits | None = None) -> str:
        """Run one test of a program's functions.

        The program runs in one sandbox and the test in another; only values pass between them (remote.py).

        Returns:
            'pass', 'fail' (the assertion), 'error' (another exception), 'exit' (the program ended before its test did),
            'timeout', 'memory', 'output' or 'killed'.
        """
        limits = limits or self.limits
        test = {"test": check.test, "setup": check.setup, "given": check.given}
        test |= {"entries": list(check.entries), "common": COMMON}
        longer = replace(limits, cpu=limits.cpu + CHECKS_CPU)
        with contextlib.ExitStack() as stack:
            theirs, ours = socket.socketpair()
            stack.callback(theirs.close)
            stack.callback(ours.close)
            checks = self._start("checks", "checks", test, longer, stack, "", ours.fileno())
            functions = self._start("programs", "functions", {"text": program}, limits, stack, "", theirs.fileno())
            theirs.close()
            ours.close()
            verdict, tested = watch([checks, functions])
        said = verdict.output.decode("ascii", "replace")
        if tested.word not in (PASS, KILLED):
            return tested.word  # the reason behind whatever the test saw
        if verdict.word != PASS:
            return verdict.word
        return said if said in (PASS, FAIL, ERROR, EXIT) else ERROR

    def close(self) -> None:
        """End the zygotes and all inside."""
        for zygote in self._zygotes.values():
            zygote.close()
        self._zygotes.clear()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(
        self, side: str, role: str, job: dict, limits: Limits, stack: contextlib.ExitStack, stdin: str, *more: int
    ) -> Job:
        zygote = self._zygote(side)
        descriptors = [_text_file(json.dumps(job), stack), _text_file(stdin, stack)]
        reads = []
        for _ in range(2):
            read, write = os.pipe()
            stack.callback(os.close, read)
            reads.append(read)
            descriptors.append(write)
        try:
            zygote.order(role, limits, [*descriptors, *more])
        finally:
            for write in descriptors[2:]:
                os.close(write)
        return Job(zygote, limits, reads)

    def _zygote(self, side: str) -> Zygote:
        zygote = self._zygotes.get(side)
        if zygote is None or not zygote.usable():
            if zygote is not None:
                zygote.close()
            self._zygotes[side] = zygote = Zygote(self.level, self._bubblewrap, self._folder)
        return zygote


class Zygote:
    """One zygote process, from outside."""

    def __init__(self, level: str, bubblewrap: str, folder: str | None = None):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inside = level in (confine.NAMESPACES, confine.BUBBLEWRAP)  # a file system of its own
        self._folder = None if inside else tempfile.mkdtemp(prefix="sandbox-", dir=folder)
        scratch = confine.SCRATCH if inside else self._folder if level == confine.NONE else ""
        # as isolated as -I makes it, but for the environment: that is ours, and says where hashes begin
        command = [os.path.realpath(sys.executable), "-s", "-P", "-S", "-c", boot.COMMAND]
        command += [str(theirs.fileno()), level, scratch]
        if level == confine.BUBBLEWRAP:
            command = [*confine.bubblewrap_command(bubblewrap, command[0]), *command]
        sent = _file(boot.sources())
        self.busy = False
        self._before: dict[int, float] = {}
        self._ran: dict[int, float] = {}
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=sent,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=self._folder or "/",
                env=_ENVIRONMENT | ({"TMPDIR": scratch} if level == confine.NONE else {}),
                start_new_session=True,
            )
        except OSError as error:
            self.socket.close()
            raise SandboxError(f"{command[0]}: {error.strerror}") from None
        finally:
            theirs.close()
            os.close(sent)
        self.socket.settimeout(START_LIMIT)
        try:
            said = json.loads(self.socket.recv(4096) or b"{}")
        except OSError:
            said = {"refused": "no answer"}
        if "ready" not in said:
            self.process.kill()
            errors = self.process.communicate()[1].decode("utf-8", "replace").strip()
            self.close()
            raise SandboxError(said.get("refused") or (errors.splitlines() or ["it ended"])[-1])

    def usable(self) -> bool:
        return not self.busy and self.process.poll() is None

    def order(self, role: str, limits: Limits, descriptors: list[int]) -> None:
        numbers = {"cpu": int(limits.cpu) + 1, "memory": limits.memory, "processes": limits.processes}
        self.busy = True
        self._before = {pid: scheduled(pid)[1] for pid in below(self.process.pid)}
        self._ran = {}
        socket.send_fds(self.socket, [json.dumps({"role": role, "limits": numbers}).encode()], descriptors)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(b'{"stop": true}')

    def end(self) -> dict | None:
        """What it says about the program that has ended; None when the zygote itself is gone."""
        try:
            said = json.loads(self.socket.recv(4096))
        except (OSError, ValueError):
            return None
        self.busy = False
        return said

    def cpu(self) -> float:
        """Seconds that the program's processes have run: those that live, and those that an earlier call has seen,
        for who ends unawaited is counted nowhere else."""
        for pid in below(self.process.pid):
            if pid not in self._before:
                self._ran[pid] = max(self._ran.get(pid, 0.0), scheduled(pid)[0])
        return sum(self._ran.values())

    def memory(self) -> int:
        """Bytes in use by all processes below the zygote's own."""
        own = self.process.pid
        return sum(resident(pid) for pid in below(own) if pid != own)

    def delay(self) -> float:
        """Seconds that the program's processes (the one that waited longest) and the zygote have been ready to run and
        have not, since the last order."""
        found = {pid: scheduled(pid)[1] - self._before.get(pid, 0.0) for pid in below(self.process.pid)}
        own = sum(seconds for pid, seconds in found.items() if pid in self._before)
        return own + max((seconds for pid, seconds in found.items() if pid not in self._before), default=0.0)

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _text_file(text: str, stack: contextlib.ExitStack) -> int:
    descriptor = _file(text.encode("utf-8", "surrogatepass"))
    stack.callback(os.close, descriptor)
    return descriptor


def _file(content: bytes) -> int:
    """A descriptor from which this can be read, and through which nothing can be written. It is in memory."""
    writable = os.memfd_create("text")
    try:
        data = memoryview(content)
        while data:
            data = data[os.write(writable, data) :]
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)
