"""Words between processes of several hosts, here all in the process of the test, with torchrun's store played by it."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_dlm.config.errors import ConfigError, DataError, PeerError
from megatron_dlm.parallel import meeting


@pytest.fixture
def job(monkeypatch):
    """The environment of rank 0 of two hosts with two processes each."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = dict(RANK=0, WORLD_SIZE=4, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
    variables |= dict(MASTER_PORT=server.port, TORCHELASTIC_USE_AGENT_STORE=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    yield monkeypatch
    del server


def become(monkeypatch, rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank % 2))


@pytest.mark.parametrize(
    "local, world, several", [("2", "4", True), ("4", "4", False), ("", "4", False), ("x", "4", False)]
)
def test_what_a_launcher_says(monkeypatch, local: str, world: str, several: bool) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert meeting.several_hosts() is several


def test_one_process_of_each_host_speaks(job) -> None:
    spoke = []
    for rank in range(4):
        become(job, rank)
        spoke.append(meeting.speaks())
    assert spoke == [True, False, True, False]


def test_some_do_not_come(job) -> None:
    with pytest.raises(ConfigError, match="1 of the 4 processes of this job came to 127.0.0.1:"):
        meeting.meet(timedelta(seconds=0.2), 0)


def test_a_mistake_of_one_reaches_those_that_wait_for_it(job) -> None:
    become(job, 3)
    meeting.leave_note(DataError("There is no file x. Check the path."))
    meeting.leave_note(ConfigError("Later ones are not heard."))
    for rank, told in ((0, False), (1, True)):
        become(job, rank)
        with pytest.raises(DataError, match="^There is no file x. Check the path.$") as found:
            meeting.meet(timedelta(minutes=1), 0)
        assert found.value.rank == 3 and found.value.host and found.value.told is told


def test_another_attempt_knows_nothing_of_the_last_one(job) -> None:
    meeting.leave_note(DataError("There is no file x. Check the path."))
    job.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="1 of the 4 processes"):
        meeting.meet(timedelta(seconds=0.2), 0)


def test_what_is_no_users_mistake(job) -> None:
    become(job, 2)
    meeting.leave_note(ZeroDivisionError("division by zero"))
    become(job, 0)
    with pytest.raises(PeerError, match="Rank 2 on .* over an error .ZeroDivisionError: division by zero.") as found:
        meeting.meet(timedelta(minutes=1), 0)
    assert found.value.code == 75


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "


@pytest.mark.parametrize(
    "error, broken",
    [
        (RuntimeError(GLOO + "Connection closed by peer [10.77.0.2]:4242"), True),
        (RuntimeError(GLOO + "Read error [10.77.0.2]:4242: Connection reset by peer"), True),
        (RuntimeError(GLOO + "Timed out waiting 600000ms for recv operation to complete"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (dist.DistBackendError("ncclRemoteError: remote process exited or there was a network error"), True),
        (RuntimeError(GLOO + "op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (RuntimeError("Connection refused"), False),  # of something else
        (ConnectionResetError("Connection reset by peer"), False),
    ],
)
def test_a_broken_connection_is_known(error: Exception, broken: bool) -> None:
    assert meeting.is_broken(error) is broken


def test_whose_connection_it_was(monkeypatch) -> None:
    members = [meeting.Member("host-a", "10.77.0.1", 0), meeting.Member("host-b", "10.77.0.2", 0)]
    monkeypatch.setattr(meeting, "_members", members)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    try:
        try:
            raise RuntimeError(GLOO + "Connection closed by peer [10.77.0.2]:4242")
        except RuntimeError as cause:
            raise ValueError("the step failed") from cause
    except ValueError as error:
        said = str(meeting.explain(error))
    assert said.startswith(
        "The processes on host-b (10.77.0.2) have ended or cannot be reached (closed by peer). Start"
    )
    assert meeting.explain(ValueError("something else")) is None


def test_an_interface_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setenv(meeting.INTERFACE, "lo")
    meeting.check_interface()
    monkeypatch.setenv(meeting.INTERFACE, "lo,eth77")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME names eth77, and .* has lo"):
        meeting.check_interface()
