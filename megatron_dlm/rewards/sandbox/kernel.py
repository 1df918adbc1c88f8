"""System calls that Python has no name for, through the C library. Linux only.

Every function raises OSError with the kernel's own reason.
"""

from __future__ import annotations

import ctypes
import os
import platform

NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS, NEW_MOUNT, NEW_CGROUP = (
    0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x00020000, 0x02000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_DETACH = 2
_PDEATHSIG, _DUMPABLE, _CHILD_SUBREAPER, _CAPBSET_DROP, _NO_NEW_PRIVS, _AMBIENT = 1, 4, 36, 24, 38, 47
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on all architectures
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave namespaces and get new ones."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode() if options else None,
        ),
        f"mount on {target}",
    )


def pivot_root(new_root: str) -> None:
    """Make a mount point the root, and let go of the old one. The working folder is then the new root."""
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(38, f"pivot_root is not known for {platform.machine()}")
    os.chdir(new_root)
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")


def prctl(option: int, *values: int) -> int:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(option, *arguments), f"prctl {option}")


def die_with_parent() -> None:
    prctl(_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Become the parent of what descendants leave behind."""
    prctl(_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """No process of the same user may look into this one."""
    prctl(_DUMPABLE, 0)


def no_new_privileges() -> None:
    prctl(_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Nothing that this process will execute can gain a capability."""
    for capability in range(64):
        try:
            prctl(_CAPBSET_DROP, capability)
        except OSError:
            return  # beyond the last one, or not privileged to begin with


def drop_capabilities() -> None:
    """Give up every capability of this process."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, nothing), "capset")


def landlock_version() -> int:
    """ABI version; 0 where the kernel has none."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _BeneathPath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def landlock(readable: list[str]) -> None:
    """Only these files and folders can be opened from here on, for reading or executing; nothing can be written.

    Needs `no_new_privileges` before. TCP and signals to others are forbidden where the kernel knows how.
    """
    version = landlock_version()
    if not version:
        raise OSError(95, "this kernel has no Landlock")
    files = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        files |= (version >= since) << bit
    rules = _Ruleset(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), 0), "landlock")
    try:
        for path in readable:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                allowed = 0b1101 if os.path.isdir(path) else 0b101  # execute, read files, list folders
                rule = _BeneathPath(allowed, folder)
                _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0), "landlock rule")
            finally:
                os.close(folder)
        _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)
