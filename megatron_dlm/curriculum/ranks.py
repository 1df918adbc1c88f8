"""What the processes of a job say to each other between stages and while one is at work.

Each rank of the job is a controller with a child per stage. Controllers meet in the job's store: torchrun's, or one
that rank 0 keeps. Children meet in the same store, each stage under a part of its own (parallel/meeting.py), so that no
second port is needed and no stage sees what an earlier one left there.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from megatron_dlm.config import errors
from megatron_dlm.config.errors import ConfigError, Interrupted, PeerError, UserError

PART = "MEGATRON_DLM_STORE_PART"  # read by parallel/meeting.py
_MEET, _AGREE, _LEAVE = 600.0, 1800.0, 60.0  # seconds
_STOPPED = 15.0  # for those that have been told to leave
_PAUSE = 0.2


class Alone:
    """A job of one process."""

    rank, world = 0, 1
    stopped: Callable[[], int | None] = staticmethod(lambda: None)
    """The signal that has told this process to leave, if one has: it then waits for others for a short while only."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; JSON can hold them."""
        return [value]

    def decide(self, action: Callable[[], Any]) -> Any:
        """What an action of rank 0's comes to, on all ranks; a user's mistake that it finds is raised on all, and told
        by rank 0."""
        value = told = mistake = None
        if self.rank == 0:
            try:
                value = action()
            except UserError as error:
                mistake, told = error, [type(error).__name__, str(error)]
        value, told = self.gather([value, told])[0]
        if told is None:
            return value
        self.leave()
        if mistake is None:
            mistake = getattr(errors, told[0])(told[1])
            mistake.rank, mistake.told = 0, True
        raise mistake

    def fail(self, part: str, code: int) -> None:
        """Tell the others that this rank's child has failed in a stage."""

    def failed(self, part: str) -> tuple[int, int] | None:
        """(rank, exit code) of the first that has."""
        return None

    def environment(self, part: str) -> dict[str, str]:
        """Of a child in a stage."""
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # whose store outlives the child
        return {**os.environ, PART: part} if of_torchrun else dict(os.environ)

    def leave(self) -> None:
        """At the end of the run: rank 0 keeps the store until all have gone."""


class Together(Alone):
    """One of several processes. Args: store: a torch.distributed store. keeps: whether it ends with this process."""

    def __init__(self, store: Any, rank: int, world: int, keeps: bool) -> None:
        self.rank, self.world = rank, world
        self._store, self._keeps, self._count = store, keeps, 0

    def gather(self, value: Any) -> list[Any]:
        self._count += 1
        keys = [f"said {self._count}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], json.dumps(value))
        self._wait(keys, _AGREE)
        return [json.loads(self._store.get(key)) for key in keys]

    def fail(self, part: str, code: int) -> None:
        self._store.compare_set(f"failed {part}", "", json.dumps([self.rank, code]))

    def failed(self, part: str) -> tuple[int, int] | None:
        key = f"failed {part}"
        if not self._store.check([key]):
            return None
        rank, code = json.loads(self._store.get(key))
        return rank, code

    def environment(self, part: str) -> dict[str, str]:
        # The store is a controller's or torchrun's: no child opens the port
        return {**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True", PART: part}

    def leave(self) -> None:
        self._store.add("left", 1)
        deadline = time.monotonic() + _LEAVE
        while self._keeps and self._store.add("left", 0) < self.world and time.monotonic() < deadline:
            time.sleep(_PAUSE)

    def _wait(self, keys: list[str], seconds: float) -> None:
        deadline, pause, told = time.monotonic() + seconds, 0.01, None
        while not self._store.check(keys):
            if (signum := self.stopped()) is not None:
                told = told or time.monotonic()
                if time.monotonic() > told + _STOPPED:
                    raise Interrupted(signum)
            if time.monotonic() > deadline:
                raise PeerError(
                    f"A process of this job has not been heard of for {seconds:.0f} seconds. Start the job again; the "
                    "curriculum goes on from what is saved."
                )
            time.sleep(pause)
            pause = min(_PAUSE, 1.5 * pause)


def open_ranks(environment: Mapping[str, str]) -> Alone:
    """The other controllers of this job, as the launcher's environment tells of them.

    Raises:
        ConfigError: they cannot be met.
    """
    world = int(environment.get("WORLD_SIZE") or 1) if "RANK" in environment else 1
    if world == 1:
        return Alone()
    import torch.distributed as dist

    rank = int(environment["RANK"])
    keeps = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            host,
            port,
            world,
            is_master=keeps,
            timeout=timedelta(seconds=_MEET),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
        raise ConfigError(
            f"The processes of this job cannot meet at {host}:{port} ({reason}). Check MASTER_ADDR and MASTER_PORT."
        ) from None
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Together(dist.PrefixStore(f"megatron_dlm/curriculum {attempt}", store), rank, world, keeps)


def new_part(folder: str) -> str:
    """A name for one attempt at a stage that no other has had."""
    return f"stage {folder} {uuid.uuid4().hex[:12]}"
