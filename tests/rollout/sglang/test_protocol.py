"""Messages between two ends of a socket pair."""

from __future__ import annotations

import fcntl
import resource
import socket

import pytest

from megatron_dlm.rollout.sglang.protocol import Closed, Link


@pytest.fixture
def ends():
    made = [Link(end) for end in socket.socketpair()]
    yield made
    for link in made:
        link.close()


def test_messages_come_whole_and_in_order(ends) -> None:
    one, other = ends
    assert not other.ready()
    for number in range(3):
        one.send({"number": number, "text": "ä" * 1000})
    for number in range(3):
        assert other.ready() and other.receive() == {"number": number, "text": "ä" * 1000}
    assert not other.ready(0.01)
    one.close()
    assert other.ready()  # its end
    with pytest.raises(Closed):
        other.receive()
    with pytest.raises(Closed):
        other.send({})


def test_descriptors_may_have_any_number() -> None:
    """A process with many files open, as trainers with many workers are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first, second = socket.socketpair()
    try:
        if soft != resource.RLIM_INFINITY and soft < 2048:
            resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
        high = socket.socket(fileno=fcntl.fcntl(first.fileno(), fcntl.F_DUPFD_CLOEXEC, 1500))
        link, other = Link(high), Link(second)
        assert high.fileno() >= 1500 and not link.ready()
        other.send({"said": 1})
        assert link.ready(1.0) and link.receive() == {"said": 1}
        link.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        first.close()
        second.close()
