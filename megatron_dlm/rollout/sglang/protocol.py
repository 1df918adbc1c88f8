"""Messages between the trainer and its child: JSON behind an 8-byte length, over a socket pair that only the two hold.

Nothing is unpickled on either side.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from typing import Any

_LENGTH = struct.Struct("<Q")
_LONGEST = 1 << 32

Message = dict[str, Any]


class Closed(Exception):
    """The other side has gone."""


class Link:
    """One end. `send` may be called from several threads; `receive` from one."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    @classmethod
    def from_fd(cls, fd: int) -> Link:
        """The end that this process was started with."""
        return cls(socket.socket(fileno=fd))

    def send(self, message: Message) -> None:
        """
        Raises:
            Closed: nobody will read it.
        """
        text = json.dumps(message, separators=(",", ":")).encode("utf-8")
        try:
            with self._sending:
                self._end.sendall(_LENGTH.pack(len(text)) + text)
        except OSError as error:
            raise Closed(str(error)) from None

    def receive(self) -> Message:
        """The next message; waits for it.

        Raises:
            Closed: there will be none.
            ValueError: what came is no message.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > _LONGEST:
            raise ValueError(f"a message of {length} bytes was announced")
        message = json.loads(self._exactly(length))
        if not isinstance(message, dict):
            raise ValueError(f"a message is an object, not {type(message).__name__}")
        return message

    def ready(self, timeout: float = 0.0) -> bool:
        """Whether `receive` would find something (a message, or the end) within so many seconds."""
        poll = select.poll()  # unlike select, also for descriptors above 1023
        poll.register(self._end, select.POLLIN)
        return bool(poll.poll(1000 * timeout))

    def wait_for_end(self) -> None:
        """Return when the other side has closed its end, whatever is still to be read."""
        poll = select.poll()
        poll.register(self._end, select.POLLRDHUP)
        poll.poll()

    def close(self) -> None:
        self._end.close()

    def _exactly(self, count: int) -> bytearray:
        found = bytearray(count)
        view, at = memoryview(found), 0
        while at < count:
            try:
                got = self._end.recv_into(view[at:])
            except OSError as error:
                raise Closed(str(error)) from None
            if got == 0:
                raise Closed("the other process ended")
            at += got
        return found
