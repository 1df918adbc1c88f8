"""The program that is two hosts: `python -m tests.multinode.lab FOLDER`, started by tests/multinode/hosts.py.

    the test ── lab ── init ─┬─ host-a   10.77.0.1 on net0
                             └─ host-b   10.77.0.2 on net0, the other end of the cable

Each host has its own network, host name, processes, /tmp, /dev/shm and /etc/hosts, and in FOLDER/own a disk of its own
(FOLDER/own-a and FOLDER/own-b outside); all the rest of the file system they share. Its /etc/hosts gives the host's own
name the address 127.0.1.1, as Debian's installer does: whoever listens at the address of his own name is then alone.

All lives in namespaces of processes below the lab: when it goes, whatever the reason, the kernel ends them all and
takes interfaces and mounts with them. Requests come as lines of JSON on standard input, each is answered by one on
standard output; the end of input ends the lab.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from megatron_dlm.rewards.sandbox import kernel
from tests.multinode import netlink

NAMES = ("a", "b")
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
CABLE = "net0"
ROOT = Path(__file__).resolve().parents[2]


def main(folder: Path) -> None:
    """Go where there is leave to make hosts, and serve; or say why there is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed here is no answer
    try:
        _seclude()
        child = os.fork()
        if child:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
        kernel.die_with_parent()
        hosts = _settle(folder)
    except OSError as error:
        print(json.dumps({"refused": str(error)}), file=answers, flush=True)
        os._exit(0)
    print(json.dumps({"refused": None}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_ask(hosts[request.pop("host")], request)), file=answers, flush=True)
    os._exit(0)


def _seclude() -> None:
    """Namespaces for this lab; within a user namespace where this user may not make others."""
    spaces = kernel.NEW_PID | kernel.NEW_MOUNT
    try:
        kernel.unshare(spaces)
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(spaces | kernel.NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _settle(folder: Path) -> dict[str, Any]:
    """Both hosts, connected; each is a pair of files to write requests to and read answers from."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    for name in NAMES:
        (folder / f"own-{name}").mkdir()
        others = [f"{ADDRESSES[other]} host-{other}" for other in NAMES if other != name]
        (folder / f"hosts-{name}").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 host-{name}", *others, ""]))
    (folder / "own").mkdir()
    _import_all()
    (far, far_pid), hosts = _fork_host("b", folder), {}
    _expect_ready(far)
    with open(f"/proc/{far_pid}/ns/net") as network:
        near, _ = _fork_host("a", folder, network.fileno())
        _expect_ready(near)
    hosts = {"a": near, "b": far}
    _ask(far, {"op": "connect"})
    return hosts


def _import_all() -> None:
    """What a command imports, once: the forked ones then start in a moment."""
    from megatron_dlm.commands.common import prepare_process

    prepare_process()
    import megatron_dlm.__main__
    import megatron_dlm.commands.models
    import megatron_dlm.commands.sft
    import megatron_dlm.commands.tracerl
    import megatron_dlm.evaluation.evaluate
    import megatron_dlm.rl.trainer
    import megatron_dlm.sft.trainer  # noqa: F401


def _ask(host: Any, request: dict) -> dict:
    print(json.dumps(request), file=host, flush=True)
    return json.loads(host.readline())


def _expect_ready(host: Any) -> None:
    said = json.loads(host.readline())
    if "error" in said:
        raise OSError(said["error"])


def _fork_host(name: str, folder: Path, cable_to: int | None = None) -> tuple[Any, int]:
    here, there = socket.socketpair()
    child = os.fork()
    if child:
        there.close()
        return here.makefile("rw"), child
    here.close()
    line = there.makefile("rw")
    try:
        kernel.die_with_parent()
        kernel.unshare(kernel.NEW_NET | kernel.NEW_UTS | kernel.NEW_IPC | kernel.NEW_MOUNT | kernel.NEW_PID)
        init = os.fork()  # only children are in the new process namespace
        if init:
            os.waitpid(init, 0)
            os._exit(0)
        kernel.die_with_parent()
        _furnish(name, folder)
        netlink.set_link("lo", True)
        if cable_to is not None:
            netlink.make_pair(CABLE, CABLE, cable_to)
            _connect(name)
        print("{}", file=line, flush=True)
    except OSError as error:
        print(json.dumps({"error": f"{error} (host-{name})"}), file=line, flush=True)
        os._exit(0)
    _Host(name).serve(line)
    os._exit(0)


def _connect(name: str) -> None:
    netlink.add_address(CABLE, ADDRESSES[name], 24)
    netlink.set_link(CABLE, True)


def _furnish(name: str, folder: Path) -> None:
    """What a host has for itself; what is below /tmp and needed here stays in its place."""
    socket.sethostname(f"host-{name}")
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.mount(str(folder / f"hosts-{name}"), "/etc/hosts", None, kernel.MS_BIND)
    kernel.mount(str(folder / f"own-{name}"), str(folder / "own"), None, kernel.MS_BIND)
    wanted = {Path(place).resolve() for place in (ROOT, folder, sys.prefix, sys.base_prefix, *filter(None, sys.path))}
    for private in map(Path, ("/tmp", "/dev/shm")):
        kept = sorted(place for place in wanted if place.is_relative_to(private) and place.is_dir())
        kept = [place for place in kept if not any(place != other and place.is_relative_to(other) for other in kept)]
        opened = [os.open(place, os.O_PATH) for place in kept]
        kernel.mount("tmpfs", str(private), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
        for place, descriptor in zip(kept, opened):
            place.mkdir(parents=True)
            kernel.mount(f"/proc/self/fd/{descriptor}", str(place), None, kernel.MS_BIND | kernel.MS_REC)
            os.close(descriptor)


class _Host:
    """The first process of a host: starts programs, and buries them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.codes: dict[int, int] = {}

    def serve(self, line: Any) -> None:
        for request in line:
            request = json.loads(request)
            answer = getattr(self, request.pop("op"))(**request)
            print(json.dumps(answer), file=line, flush=True)

    def connect(self) -> dict:
        _connect(self.name)
        return {}

    def link(self, up: bool) -> dict:
        netlink.set_link(CABLE, up)
        return {}

    def start(self, words: list[str], command: bool, environment: dict, folder: str, output: str) -> dict:
        """Args: command: whether the words are those of `megatron-dlm`, run in a fork of this process; otherwise they
        name a program. output: file that gets standard output and standard error, line by line.
        """
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.chdir(folder)
                os.environ.update(environment)
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
                    os.dup2(source, target)
                code = _command(words) if command else os.execvp(words[0], words)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        return {"pid": pid}

    def poll(self, pid: int) -> dict:
        self._bury()
        return {"code": self.codes.get(pid)}

    def kill(self) -> dict:
        """End every process of this host but this one."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        self._bury()
        return {}

    def _bury(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (done := os.waitpid(-1, os.WNOHANG))[0]:
                self.codes[done[0]] = os.waitstatus_to_exitcode(done[1])


def _command(words: list[str]) -> int:
    from megatron_dlm.__main__ import main

    try:
        return main(words)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
