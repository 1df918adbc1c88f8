"""Which of this host's addresses, and which network interface, others reach it by. Linux; no packet is sent."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_ANY_PORT = 9


def own_address(other: str) -> str:
    """The address of this host from which it would speak to another one; a loopback address if that is itself.

    Raises:
        OSError: nobody knows the other one, or there is no way to it.
    """
    family, kind, _, _, place = socket.getaddrinfo(other, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # of a datagram socket: only asks the routing table
        return probe.getsockname()[0].partition("%")[0]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def interface_of(address: str) -> str | None:
    """The interface that has this address; None if there is none."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        return _interface_of_6(wanted)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel:
        for name in interfaces():
            try:
                answer = fcntl.ioctl(kernel, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == str(wanted):
                return name
    return None


def _interface_of_6(wanted: ipaddress.IPv6Address) -> str | None:
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, *_, name = line.split()
        if ipaddress.IPv6Address(int(digits, 16)) == wanted:
            return name
    return None
