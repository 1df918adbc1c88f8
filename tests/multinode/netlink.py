"""Network interfaces through the kernel's own messages: what `ip link` and `ip address` would do, without the program.

Every function raises OSError with the kernel's reason. They need CAP_NET_ADMIN in the network namespace.
"""

from __future__ import annotations

import os
import socket
import struct

_NEW_LINK, _NEW_ADDRESS, _ERROR = 16, 20, 2
_REQUEST, _ACK, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x200, 0x400
_NAME, _LINK_INFO, _NAMESPACE_FD, _KIND, _DATA, _PEER = 3, 18, 28, 1, 2, 1  # attributes of links
_ADDRESS, _LOCAL = 1, 2  # attributes of addresses
_UP = 0x1


def make_pair(name: str, peer: str, namespace: int) -> None:
    """Two Ethernet interfaces with a cable between them: one here, its peer in another network namespace.

    Args:
        namespace: a descriptor of that namespace.
    """
    there = _link() + _attribute(_NAME, _text(peer)) + _attribute(_NAMESPACE_FD, struct.pack("I", namespace))
    info = _attribute(_KIND, b"veth") + _attribute(_DATA, _attribute(_PEER, there))
    _request(_NEW_LINK, _link() + _attribute(_NAME, _text(name)) + _attribute(_LINK_INFO, info), _CREATE | _EXCLUSIVE)


def set_link(name: str, up: bool) -> None:
    _request(_NEW_LINK, _link(socket.if_nametoindex(name), _UP if up else 0, _UP))


def add_address(name: str, address: str, prefix: int) -> None:
    packed = socket.inet_aton(address)
    header = struct.pack("=BBBBI", socket.AF_INET, prefix, 0, 0, socket.if_nametoindex(name))
    _request(
        _NEW_ADDRESS,
        header + _attribute(_LOCAL, packed) + _attribute(_ADDRESS, packed),
        _CREATE | _EXCLUSIVE,
    )


def _link(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, change)


def _text(word: str) -> bytes:
    return word.encode() + b"\0"


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + b"\0" * (-length % 4)


def _request(kind: int, content: bytes, flags: int = 0) -> None:
    """Send one message and wait until the kernel has done it."""
    header = struct.pack("=IHHII", 16 + len(content), kind, _REQUEST | _ACK | flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(header + content)
        answer = kernel.recv(65536)
    (said,) = struct.unpack_from("=H", answer, 4)
    (code,) = struct.unpack_from("=i", answer, 16)
    if said != _ERROR or code:
        raise OSError(-code, os.strerror(-code))
