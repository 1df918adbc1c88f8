"""One process gives up what it could do.

`enter` is called once in a zygote, before it has read anything from anybody, and puts it where its children live:

  namespaces   user, process, mount, network, IPC and host-name namespaces of its own; the root is an empty file system
               in memory with Python's library and the shared libraries (read only), four devices, and /tmp;
  bubblewrap   the same, already done by bwrap around this process;
  landlock     no namespaces: the kernel refuses all files but Python's library and the shared libraries;
  none         nothing.

`give_up` is called in each child before a program's first line: ids, capabilities, limits, and the filter of system
calls. It comes after the fork, so that children own nothing by which they could reach the zygote or each other.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

from megatron_dlm.rewards.sandbox import filters, kernel

BUBBLEWRAP, NAMESPACES, LANDLOCK, NONE = "bubblewrap", "namespaces", "landlock", "none"
LEVELS = (BUBBLEWRAP, NAMESPACES, LANDLOCK)  # what isolates

NOBODY = 65534
OWN_IDS = 1 << 30  # beyond what hosts give to users: one id per zygote where there is no user namespace
SCRATCH = "/tmp"
LARGEST_FILE, SCRATCH_SIZE, SCRATCH_FILES, OPEN_FILES, STACK = 16 << 20, 64 << 20, 4096, 64, 64 << 20
_DEVICES = ("null", "zero", "random", "urandom")
_SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")


@lru_cache(maxsize=1)
def readable_folders() -> list[str]:
    """What Python needs to import its standard library, without links; nothing that users have installed or written."""
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    modules = os.path.realpath(sysconfig.get_config_var("DESTSHARED") or stdlib)
    own = os.path.realpath(os.path.join(sys.base_prefix, "lib"))  # libraries that a private Python brings along
    libraries = {os.path.realpath(path) for path in _SHARED_LIBRARIES if os.path.isdir(path)}
    found: list[str] = []
    for path in sorted({stdlib, modules, *libraries, *([own] if own != "/lib" else [])}):
        if os.path.isdir(path) and not any(path.startswith(kept + "/") for kept in found):
            found.append(path)
    return found


def hidden_folders() -> list[str]:
    """Folders among those that hold installed packages: a program of a test gets the standard library only."""
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    names = (os.path.join(stdlib, name) for name in ("site-packages", "dist-packages"))
    extra = ("/usr/lib/python3/dist-packages", "/usr/local/lib")
    return [path for path in (*names, *extra) if os.path.isdir(path) and not stdlib.startswith(path + "/")]


def enter(level: str) -> int | None:
    """Confine this process.

    Returns:
        the user that `give_up` is to become: nobody, or an id of this zygote's own; None to stay who it is.

    Raises:
        OSError: the host does not permit it.
    """
    if level == NAMESPACES:
        return _enter_namespaces()
    kernel.hide_memory()
    if level == BUBBLEWRAP:
        return None
    kernel.adopt_orphans()
    own = level == LANDLOCK and os.geteuid() == 0 and all(map(_open_to_all, readable_folders()))
    return OWN_IDS + os.getpid() if own else None


def _open_to_all(folder: str) -> bool:
    """Whether any user may come to this folder: who keeps Python at home must stay who he is."""
    path = Path(folder)
    return all(place.stat().st_mode & 0o001 for place in (path, *path.parents))


def _enter_namespaces() -> int | None:
    """Ends the calling process's own part: what returns is a child, the first process of the new namespaces."""
    euid, egid = os.geteuid(), os.getegid()
    own = OWN_IDS + os.getpid()  # as the host numbers it: inside, all zygotes have the same number
    rest = kernel.NEW_PID | kernel.NEW_MOUNT | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS
    mapper = _Mapper(euid, egid)
    try:
        kernel.unshare(kernel.NEW_USER | rest)
    except OSError:
        mapper.stop()
        if euid != 0:
            raise
        kernel.unshare(rest)  # no user namespaces here, but privileges enough without
        user = own
    else:
        user = mapper.write()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.die_with_parent()
    kernel.hide_memory()
    _build_root()
    return user


class _Mapper:
    """Writes the id maps of this process's user namespace.

    A privileged process wants two ids inside (root builds, nobody runs), and only one that has stayed outside may write
    such maps: a helper. Others get the one id that they are.
    """

    def __init__(self, euid: int, egid: int):
        self._euid, self._egid, self._helper = euid, egid, 0
        if euid != 0:
            return
        parent, (read, self._go) = os.getpid(), os.pipe()
        self._helper = os.fork()
        if not self._helper:
            os.close(self._go)
            code = 1
            with contextlib.suppress(OSError):
                if os.read(read, 1):
                    for kind in ("uid_map", "gid_map"):
                        _write(f"/proc/{parent}/{kind}", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                    code = 0
            os._exit(code)
        os.close(read)

    def stop(self) -> None:
        if self._helper:
            os.close(self._go)
            os.waitpid(self._helper, 0)

    def write(self) -> int | None:
        """Returns what `enter` does."""
        if self._helper:
            os.write(self._go, b"g")
            os.close(self._go)
            if os.waitpid(self._helper, 0)[1] == 0:
                return NOBODY
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {self._euid} 1\n")
        _write("/proc/self/gid_map", f"{NOBODY} {self._egid} 1\n")
        return None


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _build_root() -> None:
    """An almost empty root in memory, then nothing else."""
    folders, hidden = readable_folders(), hidden_folders()
    # Any folder will do for the new root, as it is covered in our mount namespace only, but none that we need.
    root = next(path for path in ("/tmp", "/mnt", "/sys") if not any(kept.startswith(path + "/") for kept in folders))
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for folder in folders:
        _bind(folder, root + folder)
    for folder in hidden:
        if any(folder == kept or folder.startswith(kept + "/") for kept in folders):
            kernel.mount("tmpfs", root + folder, "tmpfs", kernel.MS_RDONLY | kernel.MS_NOSUID, "size=4k")
    for path in _SHARED_LIBRARIES:
        if os.path.islink(path) and not os.path.lexists(root + path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
    os.makedirs(root + "/dev")
    for name in _DEVICES:
        open(f"{root}/dev/{name}", "w").close()
        kernel.mount(f"/dev/{name}", f"{root}/dev/{name}", None, kernel.MS_BIND)
    os.mkdir(root + SCRATCH)
    kernel.mount(
        "tmpfs",
        root + SCRATCH,
        "tmpfs",
        kernel.MS_NOSUID | kernel.MS_NODEV,
        f"size={SCRATCH_SIZE},nr_inodes={SCRATCH_FILES},mode=1777",
    )
    kernel.pivot_root(root)
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)


def _bind(source: str, target: str) -> None:
    """A folder with all that is mounted below it, which may not be left behind: it could hide something there."""
    os.makedirs(target, exist_ok=True)
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    for place in _mounts_in(target):
        flags = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
        held = os.statvfs(place).f_flag
        for flag, bit in ((os.ST_NOEXEC, kernel.MS_NOEXEC), (1024, 1024), (2048, 2048), (4096, 1 << 21)):  # noatime ...
            if held & flag:  # a mount from outside may not lose a restriction
                flags |= bit
        kernel.mount("none", place, None, flags)


def _mounts_in(folder: str) -> list[str]:
    """The folder, which is a mount point, and all mount points below it."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in file]
    return list(dict.fromkeys([folder, *(point for point in points if point.startswith(folder + "/"))]))


def bubblewrap_command(program: str, interpreter: str) -> list[str]:
    """The command line that does the same with bwrap; what is to run inside follows it."""
    command = [program, "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    folders = readable_folders()
    for folder in folders:
        command += ["--ro-bind", folder, folder]
    command += ["--ro-bind", interpreter, interpreter]
    for folder in hidden_folders():
        if any(folder == kept or folder.startswith(kept + "/") for kept in folders):
            command += ["--tmpfs", folder, "--remount-ro", folder]
    for path in _SHARED_LIBRARIES:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
    command += ["--dir", "/dev"]
    for name in _DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return [*command, "--size", str(SCRATCH_SIZE), "--tmpfs", SCRATCH, "--remount-ro", "/", "--chdir", SCRATCH]


def give_up(level: str, user: int | None, limits: dict[str, int]) -> None:
    """Become what runs a program. Nothing of it can be taken back.

    Args:
        user: what `enter` has returned.
        limits: `cpu` seconds, `memory` bytes of address space, `processes`.
    """
    if level != NONE:
        kernel.drop_bounding_set()
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if level != NONE:
        kernel.drop_capabilities()
        kernel.no_new_privileges()
    if level == LANDLOCK:
        kernel.landlock([*readable_folders(), *(f"/dev/{name}" for name in ("null", "urandom"))])
    if level not in (LANDLOCK, NONE):  # there it would count what else the user runs
        ours = 0 if user is not None else 2 if level == NAMESPACES else 1  # the zygote's own, counted with the same id
        _limit(resource.RLIMIT_NPROC, limits["processes"] + ours)
    _limit(resource.RLIMIT_CPU, limits["cpu"])
    _limit(resource.RLIMIT_AS, limits["memory"])
    _limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_STACK, STACK)
    kernel.hide_memory()
    if level != NONE and filters.supported():
        filters.forbid(level != LANDLOCK)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
