"""Process pools for tests: real jobs of several gloo processes, started once per world size.

    from tests.harness import pool

    def case(rank_independent_argument):          # a module-level function of a test module
        groups = initialize(ParallelConfig(...), seed=1)
        return something_picklable

    def test_it():
        results = pool(2).run(case, argument)      # one result per rank

Workers keep their default process group; after each case the model-parallel groups are torn down, so that every case
may ask for another layout. A worker's exception is raised in the test with its traceback; after a failure or a timeout
the pool is ended and the next `pool(n)` starts a fresh one. `pool(n, STAND_IN)` has the packages of tests/stand_in too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
STAND_IN = str(_ROOT / "tests" / "stand_in")
_pools: dict[tuple, Pool] = {}

# Workers are replaced now and then: gloo keeps polling threads of groups that are gone, a dozen for each case, and
# hundreds of them in some twenty processes take a third of the machine. They are forked with all imports made; what a
# worker must do for the first time only (page faults, the writer processes of checkpoints) is what a new one costs.
CASES_PER_POOL = 6


class WorkerError(AssertionError):
    """A case failed in a worker; the message holds the worker's traceback."""


class Pool:
    """`world_size` worker processes that run one case after the other."""

    def __init__(self, world_size: int, *paths: str) -> None:
        self.world_size, self.key = world_size, (world_size, *paths)
        self.cases_left = CASES_PER_POOL
        key = os.urandom(16)
        with Listener(("127.0.0.1", 0), backlog=world_size, authkey=key) as listener:
            _nursery(*paths).fork(
                {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
                listener.address[1],
                key,
            )
            connections = [listener.accept() for _ in range(world_size)]
        arrived = sorted(((*link.recv(), link) for link in connections), key=lambda item: item[0])
        self.pids = [pid for _, pid, _ in arrived]
        self.connections: list[Connection] = [link for _, _, link in arrived]

    def run(self, case: Callable, *args: Any, timeout: float = 180.0) -> list[Any]:
        """Run `case(*args)` on every rank; returns the results by rank."""
        task = pickle.dumps((case.__module__, case.__qualname__, args))
        for link in self.connections:
            link.send_bytes(task)
        deadline, results, failures = time.monotonic() + timeout, [], []
        for rank, link in enumerate(self.connections):
            # Once one rank has failed the others may wait for it for ever: give them a moment to say so, no more.
            patience = 3.0 if failures else max(0.0, deadline - time.monotonic())
            try:
                if not link.poll(patience):
                    failures.append(f"rank {rank}: no answer")
                    continue
                good, value = pickle.loads(link.recv_bytes())
            except EOFError:
                good, value = False, "the process has ended"
            if good:
                results.append(value)
            else:
                failures.append(f"rank {rank}: {value}")
        self.cases_left -= 1
        if failures or not self.cases_left:
            self.close()
        if failures:
            raise WorkerError("\n".join([f"{case.__qualname__} on {self.world_size} processes", *failures]))
        return results

    def close(self) -> None:
        _pools.pop(self.key, None)
        for link in self.connections:
            link.close()
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # with the helpers that checkpoint writers leave behind


class Nursery:
    """One process that has imported everything and forks workers: imports cost seconds, forks do not."""

    def __init__(self, *paths: str) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "PYTHONPATH": os.pathsep.join([*paths, str(_ROOT), *filter(None, sys.path)]), "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness"], cwd=_ROOT, env=environment, stdin=subprocess.PIPE, text=True
        )

    def fork(self, environment: dict[str, str], port: int, key: bytes) -> None:
        self.process.stdin.write(json.dumps([environment, port, key.hex()]) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _nursery(*paths: str) -> Nursery:
    nursery = Nursery(*paths)
    atexit.register(nursery.close)
    return nursery


def free_port() -> int:
    """Below the range from which the system gives ports to connections: between now and its use nobody takes it."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def pool(world_size: int, *paths: str) -> Pool:
    """The pool of this world size, started when first asked for; its workers find packages in `paths` first."""
    key = (world_size, *paths)
    if key not in _pools:
        _pools[key] = Pool(*key)
    return _pools[key]


@atexit.register
def close_pools() -> None:
    """Also called at the end of each file of tests (conftest.py): idle threads of gloo take time, too."""
    for running in list(_pools.values()):
        running.close()


_IMPORTED = (
    "megatron_dlm.checkpoint.distributed",
    "megatron_dlm.checkpoint.hf.importer",
    "megatron_dlm.evaluation.evaluate",
    "megatron_dlm.rl.trainer",
    "megatron_dlm.rollout.rig",
    "megatron_dlm.sft.trainer",
    "tests.small_model",
    "tests.tiny",
)


def _serve_nursery() -> None:
    import torch

    from megatron_dlm import platform
    from megatron_dlm.platform import te

    if STAND_IN in sys.path:  # imported, it is not hidden where there is no GPU
        importlib.import_module("transformer_engine")
        te.found()  # once for all workers
    if not platform.is_cuda():  # a process that has touched CUDA cannot be forked
        platform.install()

    for module in _IMPORTED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    # What is there stays for good: garbage collections in the workers need not look at it, nor copy its pages.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, lambda *_: _bury())
    for order in sys.stdin:
        environment, port, key = json.loads(order)
        for rank in range(int(environment["WORLD_SIZE"])):
            if os.fork() == 0:
                os.setpgid(0, 0)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
                _work(port, bytes.fromhex(key))
                os.killpg(0, signal.SIGKILL)  # gloo's threads need no farewell


def _bury() -> None:
    """Wait for the workers that have ended; so their processor time is counted as that of the test session."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _work(port: int, key: bytes) -> None:
    from megatron_dlm import platform
    from megatron_dlm.parallel import groups
    from tests import tiny

    platform.install()
    link = Client(("127.0.0.1", port), authkey=key)
    link.send((int(os.environ["RANK"]), os.getpid()))
    while True:
        try:
            module, name, args = pickle.loads(link.recv_bytes())
        except EOFError:
            return  # the test session is over
        try:
            answer = pickle.dumps((True, getattr(importlib.import_module(module), name)(*args)))
        except BaseException:  # whatever it is, the test must see it
            answer = pickle.dumps((False, traceback.format_exc()))
        groups.destroy(keep_world=True)
        tiny.one_process.cache_clear()
        gc.collect()  # models hold on to groups, in circles, and each group to its threads
        link.send_bytes(answer)


if __name__ == "__main__":
    _serve_nursery()
