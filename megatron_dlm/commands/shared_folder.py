"""Whether a folder is the same one on all hosts of a job, found out before anything is computed for it.

Every process writes its part of a checkpoint itself; on a host with a disk of its own they would lie where no other
process, and no later run, finds them.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

_SECONDS, _PAUSE = 5.0, 0.1  # a network file system may show a new file late


def check_shared(flag: str, given: str, is_main: bool) -> None:
    """Refuse a folder in which a host does not find what rank 0 has just put there. Collective; does nothing in a job
    of one host.

    Args:
        flag: that named the folder. given: the folder; rank 0 can write in it.

    Raises:
        ConfigError: so it is.
    """
    from megatron_dlm.config.errors import ConfigError
    from megatron_dlm.parallel import meeting
    from megatron_dlm.parallel.exchange import broadcast_object, gather_objects

    if not meeting.several_hosts():
        return
    mark, name = None, None
    if is_main:
        mark = tempfile.NamedTemporaryFile(dir=given, prefix=".shared-")
        name = Path(mark.name).name
    try:
        name = broadcast_object(name, src=0)
        hosts = gather_objects((socket.gethostname(), _appears(Path(given), name)))
    finally:
        if mark is not None:
            mark.close()
    blind = [host for host, seen in hosts if not seen]
    if blind:
        error = ConfigError(
            f"{flag} {given} is not one folder: what {hosts[0][0]} writes there, {blind[0]} does not see. Give a "
            "folder on a file system that all hosts share."
        )
        error.rank, error.told = 0, not meeting.speaks()
        raise error


def _appears(folder: Path, name: str) -> bool:
    """Whether a file shows up in a folder, in good time. Listing it makes a network file system ask its server."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            if name in os.listdir(folder):
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
