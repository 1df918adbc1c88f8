"""How the processes of several hosts meet, and how those that stay learn why another one has gone.

Of a job on one host torch and the launcher know enough. On several, each host has a launcher and a terminal of its own:
a process that finds a mistake before the others have met it would leave them waiting for minutes, and one that leaves
later is a broken connection to them. So here

  - all processes first write down their names in the job's store and count each other, and only then connect;
  - whoever leaves over an error leaves a note there, and the other hosts tell it as well (`leave_note`, `explain`);
  - the network interface through which gloo listens is the one by which the other hosts are reached, whatever address
    this host's own name has;
  - a host that falls silent is noticed by the others (parallel/watch.py).

Invariants (tests/multinode):
  - a mistake that only one host can find ends all of them, soon, each with that sentence;
  - a host that ends without a word, or cannot be reached, ends the others within --host-timeout-seconds.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_dlm.config import errors
from megatron_dlm.config.errors import ConfigError, PeerError, UserError
from megatron_dlm.parallel import addresses
from megatron_dlm.parallel.watch import HEARD, NOTE, PERIOD, Watch

INTERFACE = "GLOO_SOCKET_IFNAME"
PART = "MEGATRON_DLM_STORE_PART"  # set by what runs several jobs one after the other in one store (curriculum/ranks.py)
ADVICE = "Start the job again; what a run has saved it goes on from with --load."
_ARRIVED = "arrived"
_NOTE_SECONDS = 5.0  # for a word to the others, or from them
_BUG = "Exception"
_BROKEN = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "unreachable",
    "failed to recv",
    "socket has timed out",
    "remote process exited",
    "communicator was aborted",
)  # what gloo, NCCL and the store say of a connection that is no more


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the job. Attributes: host: the name of its host. address: of its host, as others reach it."""

    host: str
    address: str
    local_rank: int

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


_members: list[Member] = []  # by rank, once all of several hosts have met
_watch: Watch | None = None


def number(name: str) -> int:
    """What a launcher says in this variable; 0 where it says nothing."""
    given = os.environ.get(name, "")
    return int(given) if given.isdecimal() else 0


def several_hosts() -> bool:
    """Whether this job has processes on other hosts, as torchrun and other launchers say it."""
    return 0 < number("LOCAL_WORLD_SIZE") < number("WORLD_SIZE")


def speaks() -> bool:
    """Whether this process tells what all of them know: rank 0; on several hosts, where each has a terminal, the first
    of each."""
    return number("LOCAL_RANK" if several_hosts() else "RANK") == 0


def meet(timeout: timedelta, silence: float) -> dist.Store:
    """Wait until all processes of a job on several hosts are there.

    Args:
        timeout: how long.
        silence: seconds after which a host that is not heard of is given up; 0: never.

    Returns:
        The store for the default process group.

    Raises:
        ConfigError: they do not all come. Also, whatever mistake another of them has left over.
        dist.DistError: the store cannot be reached.
    """
    rank, world = number("RANK"), number("WORLD_SIZE")
    store = _connect(timeout)
    notes = _notes(store)
    me = Member(socket.gethostname(), _address(os.environ["MASTER_ADDR"]), number("LOCAL_RANK"))
    notes.set(f"member/{rank}", json.dumps([me.host, me.address, me.local_rank]))
    notes.set(f"beat/{rank}", "0")
    deadline, pause = time.monotonic() + timeout.total_seconds(), 0.02
    there = notes.add(_ARRIVED, 1)
    while there < world:
        left = _read_note(notes)
        if left is not None:
            notes.add(HEARD, 1)
            raise left
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{there} of the {world} processes of this job came to {_place()} within {timeout}. Check that all "
                "hosts were started, with the same --nnodes and --nproc-per-node."
            )
        time.sleep(pause)
        pause, there = min(1.0, 1.5 * pause), notes.add(_ARRIVED, 0)
    _members[:] = [Member(*json.loads(said)) for said in notes.multi_get([f"member/{one}" for one in range(world)])]
    _choose_interface(rank)
    if silence and me.local_rank == 0:
        _start_watch(rank, silence)
    return dist.PrefixStore("group", notes)


def store_of_part(timeout: timedelta) -> dist.Store | None:
    """The store for the default process group of one of several jobs that share the store of another process; None
    where this is not so.

    Raises:
        dist.DistError: the store cannot be reached.
    """
    return dist.PrefixStore("group", _notes(_connect(timeout))) if os.environ.get(PART) else None


def check_interface() -> None:
    """Refuse an interface for gloo that this host does not have.

    Raises:
        ConfigError: so it is.
    """
    given = os.environ.get(INTERFACE)
    if not given:
        return
    there = addresses.interfaces()
    missing = [name for name in given.split(",") if name not in there]
    if missing:
        raise ConfigError(
            f"{INTERFACE} names {missing[0]}, and {socket.gethostname()} has {', '.join(there)}. Give one of them, or "
            "unset it: the one that leads to the other hosts is then found."
        )


def leave_note(error: BaseException) -> None:
    """Tell the processes on other hosts why this one leaves; whoever says so first is heard. Waits a few seconds at
    most. Does nothing in a job of one host."""
    if not several_hosts() or isinstance(error, PeerError) or getattr(error, "told", False):
        return
    kind = type(error).__name__ if isinstance(error, UserError) else _BUG
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:300]}"
    note = json.dumps([kind, said, number("RANK"), socket.gethostname()])

    def leave() -> None:
        notes = _notes(_connect(timedelta(seconds=_NOTE_SECONDS)))
        notes.compare_set(NOTE, "", note)
        heard, deadline = notes.add(HEARD, 1), time.monotonic() + PERIOD + 1
        ears = 1 + len(_watch.others) if _watch is not None else number("WORLD_SIZE")
        while _keeps_store() and heard < ears and time.monotonic() < deadline:  # the store ends with this process
            time.sleep(0.05)
            heard = notes.add(HEARD, 0)

    _within(_NOTE_SECONDS + PERIOD, leave)


def explain(error: BaseException) -> UserError | None:
    """What an error says about other processes of this job: the note that one has left, or that some cannot be reached.
    None where it is no such error."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    seen: list[BaseException] = []
    while error is not None and error not in seen and not is_broken(error):
        seen.append(error)
        error = error.__cause__ or error.__context__
    if error is None or error in seen:
        return None
    said = " ".join(str(error).split())
    if several_hosts():
        soon = timedelta(seconds=_NOTE_SECONDS)
        known = _watch and _watch.note
        left = _of_note(known) if known else _within(_NOTE_SECONDS, lambda: _read_note(_notes(_connect(soon))))
        if left is not None:
            return left
    return PeerError(f"{_who(said)} {_what(said)}. {ADVICE}")


def is_broken(error: BaseException) -> bool:
    """Whether an error is a connection to another process that is no more."""
    ours = (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)
    said = str(error)
    if not isinstance(error, ours) and not (isinstance(error, RuntimeError) and "gloo" in said):
        return False
    return any(words in said for words in _BROKEN)


def stop_watching(leaving: bool = False) -> None:
    """The end of the watch over other hosts. Args: leaving: tell them that this one ends in peace."""
    global _watch
    if _watch is not None:
        _watch.stop(leaving)
        _watch = None


# ---- the store


def _connect(timeout: timedelta) -> dist.Store:
    """A connection to the job's store, which rank 0 keeps if torchrun does not."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        number("WORLD_SIZE"),
        is_master=_keeps_store(),
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _keeps_store() -> bool:
    return number("RANK") == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _notes(store: dist.Store) -> dist.PrefixStore:
    """torchrun's store outlives an attempt of the job, so each has a part of its own; so has each job of several."""
    part = os.environ.get(PART)
    of_job = f"/{part}" if part else ""
    return dist.PrefixStore(f"megatron_dlm/attempt {number('TORCHELASTIC_RESTART_COUNT')}{of_job}", store)


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _host(rank: int) -> int:
    return rank // number("LOCAL_WORLD_SIZE")


def _read_note(notes: dist.Store) -> UserError | None:
    return _of_note(notes.get(NOTE)) if notes.check([NOTE]) else None


def _of_note(note: bytes) -> UserError:
    kind, said, rank, host = json.loads(note)
    if kind == _BUG:
        return PeerError(
            f"Rank {rank} on {host} has ended over an error ({said}), of which its own output says more. {ADVICE}"
        )
    error = getattr(errors, kind)(said)
    error.rank, error.host, error.told = rank, host, not speaks()
    return error


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """What an action comes to, if it does so in time; None otherwise, and where it fails."""
    found: list[Any] = []

    def act() -> None:
        try:
            found.append(action())
        except Exception:  # the store may be what is lost
            pass

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


# ---- addresses


def _address(other: str) -> str:
    try:
        return addresses.own_address(other)
    except OSError:
        return "127.0.0.1"  # says nothing


def _choose_interface(rank: int) -> None:
    """Let gloo listen where other hosts reach this one. The host of the store has spoken to itself, and asks again."""
    if os.environ.get(INTERFACE):
        return
    own = _members[rank]
    address = own.address
    if addresses.is_loopback(address):
        far = [one.address for one in _members if not addresses.is_loopback(one.address)]
        address = _address(far[0]) if far else address
    if addresses.is_loopback(address):
        return  # all hosts are this one
    for other, one in enumerate(_members):
        if _host(other) == _host(rank):
            _members[other] = Member(one.host, address, one.local_rank)
    interface = addresses.interface_of(address)
    if interface is not None:
        os.environ[INTERFACE] = interface


def _who(said: str) -> str:
    """Whose connection an error speaks of."""
    found = re.search(r"\[(?:::ffff:)?([0-9a-fA-F.:]+)\]:\d+", said)
    hosts = [one for one in _members if found and one.address == found[1]]
    return f"The processes on {hosts[0]}" if hosts else "Other processes of this job"


def _what(said: str) -> str:
    words = next(words for words in _BROKEN if words in said)
    if words == "Timed out waiting":
        return "have not answered within --distributed-timeout-minutes"
    return f"have ended or cannot be reached ({words})"


# ---- the watch


def _start_watch(rank: int, silence: float) -> None:
    global _watch
    others = {one: str(member) for one, member in enumerate(_members) if member.local_rank == 0 and one != rank}
    seconds = timedelta(seconds=max(1.0, silence))
    _watch = Watch(lambda: _notes(_connect(seconds)), rank, others, silence, _lose)
    _watch.start()


def _lose(who: str | None, seconds: float) -> None:
    """Called by the watch: end this process, whose main thread may wait in a collective operation for that host."""
    who = f"The host {_place()}, which keeps the job's store," if who is None else f"The host {who}"
    silent = f"{who} has not been heard of for {seconds:g} seconds (--host-timeout-seconds)"
    sys.stdout.flush()
    print(f"PeerError: {silent}. {ADVICE}", file=sys.stderr, flush=True)
    os._exit(PeerError.code)
