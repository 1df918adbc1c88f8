"""Which isolation this host offers, tried for real.

A level counts when a program that is run in it cannot do what it must not, and an honest one works: nothing is
concluded from versions or settings. From the strongest down: bubblewrap, namespaces, landlock. `none` is no isolation,
and is never chosen: it has to be asked for by name.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import tempfile

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.rewards.sandbox import confine
from megatron_dlm.rewards.sandbox.runner import Sandbox, SandboxError
from megatron_dlm.rewards.sandbox.watch import Limits

AUTO = "auto"
_WHAT = {
    confine.BUBBLEWRAP: "bubblewrap (namespaces, an empty root, no network)",
    confine.NAMESPACES: "namespaces of their own (an empty root, no network, no other process in sight)",
    confine.LANDLOCK: "Landlock and a filter of system calls (no files, no network, one process each)",
    confine.NONE: "NO isolation, as --code-isolation none asks: they can do whatever this user can",
}
_PROBE_LIMITS = Limits(cpu=5.0, processes=4)

# What a program must not be able to do; it prints the names of what it could.
_PROBE = """
import os, socket, time

def can(name, action):
    try:
        action()
    except (OSError, RuntimeError):
        return
    print(name)

def connect():
    socket.create_connection(("127.0.0.1", PORT), timeout=1.0)

def fork_much():
    children = []
    try:
        for _ in range(64):
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, 9)

can("read " + SECRET, lambda: open(SECRET).read())
can("write " + SECRET, lambda: open(SECRET, "a").write("x"))
can("list /", lambda: os.listdir("/home"))
can("read /etc/passwd", lambda: open("/etc/passwd").read())
can("read /proc", lambda: open("/proc/%d/status" % PARENT).read())
can("write beside " + SECRET, lambda: open(SECRET + ".new", "w").close())
can("signal the trainer", lambda: os.kill(PARENT, 0))
can("use the network", connect)
can("start any number of processes", fork_much)
print("done")
"""


def choose(wanted: str) -> str:
    """The level to use.

    Args:
        wanted: 'auto' for the strongest that works here, or a level by name.

    Raises:
        ConfigError: the host does not offer it, or nothing but 'none'.
    """
    if wanted == confine.NONE:
        return wanted
    tried = {level: trouble(level) for level in (_order() if wanted == AUTO else (wanted,))}
    for level, found in tried.items():
        if found is None:
            return level
    reasons = "; ".join(f"{level}: {found}" for level, found in tried.items())
    if wanted != AUTO:
        raise ConfigError(
            f"--code-isolation {wanted} does not work on this host ({reasons}). Use --code-isolation auto, which takes "
            "what works."
        )
    raise ConfigError(
        f"Programs of a model are not run without isolation, and this host offers none ({reasons}). Allow user "
        "namespaces, install bubblewrap, or accept the danger with --code-isolation none."
    )


def describe(level: str) -> str:
    """A sentence for the log of a run."""
    return f"Programs are run in {_WHAT[level]}." if level != confine.NONE else f"Programs are run with {_WHAT[level]}."


def _order() -> tuple[str, ...]:
    """A root that stays root under bwrap is counted nowhere, so its processes cannot be limited: the probe finds that,
    and namespaces, where it becomes nobody, come first to save the time."""
    order = confine.LEVELS
    return order if os.geteuid() else (confine.NAMESPACES, *(level for level in order if level != confine.NAMESPACES))


@functools.cache
def trouble(level: str) -> str | None:
    """Why a level is of no use here, or None when it holds. Takes some tenths of a second, once."""
    if level == confine.BUBBLEWRAP and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    with tempfile.TemporaryDirectory(prefix="probe-") as folder, socket.socket() as listener:
        secret = os.path.join(folder, "secret")
        with open(secret, "w", encoding="ascii") as file:
            file.write("secret")
        os.chmod(folder, 0o777)
        os.chmod(secret, 0o666)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        known = f"SECRET, PORT, PARENT = {secret!r}, {listener.getsockname()[1]}, {os.getpid()}\n"
        try:
            with Sandbox(level, _PROBE_LIMITS) as sandbox:
                outcome = sandbox.run(known + _PROBE)
        except SandboxError as error:
            return str(error)
    said = outcome.output.decode("utf-8", "replace").split("\n")
    if outcome.word != "pass" or "done" not in said:
        words = outcome.errors.decode("utf-8", "replace").strip() or outcome.word
        return f"a harmless program did not work in it ({words[:200]})"
    could = [line for line in said if line not in ("done", "")]
    return f"a program in it could {', '.join(could)}" if could else None
