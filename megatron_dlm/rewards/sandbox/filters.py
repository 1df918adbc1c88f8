"""System calls that a program may not make.

A second wall behind namespaces, and the wall itself where there are none: a filter in the kernel that answers EPERM.
It forbids what no honest program of a test needs and what the kernel's own bugs have mostly been found in: other
processes' memory, mounts, new namespaces, sockets, kernel keys, io_uring, memory that no limit counts.
"""

from __future__ import annotations

import ctypes
import platform
import struct

from megatron_dlm.rewards.sandbox import kernel

# name: (x86_64, aarch64); None where the architecture has no such call
_ALWAYS = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "io_uring_setup": (425, 425), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447), "personality": (135, 92),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
}  # fmt: skip
# What a process could do to others of its user, and to its files' names and modes, where no namespace hides them.
_WITHOUT_NAMESPACES = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "fork": (57, None), "vfork": (58, None), "prlimit64": (302, 261), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEW_NAMESPACES = (
    kernel.NEW_USER | kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS | kernel.NEW_MOUNT
    | kernel.NEW_CGROUP
)  # fmt: skip

_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _DENY, _UNKNOWN, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000
_X32 = 0x40000000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def supported() -> bool:
    """Whether this architecture's system calls are known here."""
    return platform.machine() in _AUDIT


def forbid(namespaces: bool) -> None:
    """Apply the filter to this process and all it will start. Needs `no_new_privileges` before.

    Args:
        namespaces: whether namespaces hide the host's processes and files already.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    code = program(platform.machine(), namespaces)
    given = _Program(len(code) // 8, code)
    kernel.prctl(22, 2, ctypes.addressof(given))


def program(machine: str, namespaces: bool) -> bytes:
    """The filter, as instructions for the kernel."""
    column = list(_AUDIT).index(machine)
    table = _ALWAYS if namespaces else _ALWAYS | _WITHOUT_NAMESPACES
    numbers = sorted(pair[column] for pair in table.values() if pair[column] is not None)
    lines = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL),  # another architecture's numbers
        (_LOAD, 0, 0, 0), (_ABOVE, 0, 1, _X32), (_RETURN, 0, 0, _KILL),
        (_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _UNKNOWN),  # its flags are out of sight; callers try clone
    ]  # fmt: skip
    for number in numbers:
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _DENY)]
    # Where no namespace holds them together, nobody would find all processes of a program: it is one, and stays one.
    unwanted = _NEW_NAMESPACES if namespaces else 0xFFFFFFFF
    lines += [
        (_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, unwanted), (_RETURN, 0, 0, _DENY),
        (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip
    return b"".join(struct.pack("HBBI", *line) for line in lines)
