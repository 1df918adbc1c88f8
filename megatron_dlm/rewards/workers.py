"""A pool of worker processes that judge responses under a real limit per item.

What it promises (tests/rewards/test_workers.py):
  - one verdict per item, in order, whatever an item does: a judge that hangs is killed at the limit, one that takes its
    process down is replaced, and only that item pays ('timeout', 'crash');
  - the limit counts from the moment the worker starts the item: waiting in a queue, the start of a process and its
    imports are free;
  - workers import the judge's module, never the caller's program and never torch.

How: workers are bare interpreters (rewards/worker.py) behind pipes, started once. Not multiprocessing's spawn or
forkserver, because these import the caller's main module again in every worker (torch included, and a training script
without a __main__ guard would start anew); not fork, because the caller has threads and a CUDA context.

A chunk of items goes to whichever worker is free; answers come back one by one with the time, so the parent always
knows the item a worker is at. When a worker dies or is killed, that item gets its verdict and the rest of its chunk
returns to the queue.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Pipe, wait

from megatron_dlm.rewards.base import CRASH, TIMEOUT, Verdict

START_LIMIT = 120.0  # seconds until a worker has imported its judge
LARGEST_CHUNK = 32
MEMORY_LIMIT = 4 << 30  # bytes of address space per worker

Item = tuple[str, str, dict]  # response, ground truth, metadata

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_dlm.rewards.worker import main; main(int(sys.argv[2]), sys.argv[3], "
    "float(sys.argv[4]), int(sys.argv[5]), json.loads(sys.argv[6]))"
)


class WorkerPool:
    """Judges items in parallel.

        with WorkerPool("megatron_dlm.rewards.math", workers=4, timeout=5.0) as pool:
            verdicts = pool.judge([(response, ground_truth, metadata), ...])

    Nothing is left over between calls.
    """

    def __init__(
        self,
        judge_module: str,
        workers: int,
        timeout: float,
        memory_limit: int = MEMORY_LIMIT,
        options: dict | None = None,
        folder: str | None = None,
    ):
        """Start the workers; they import their judge while the caller goes on.

        Args:
            judge_module: importable module with judge(response, ground_truth, metadata) -> Verdict and, if it wants,
                prepare().
            workers: number of processes, at least 1.
            timeout: seconds of wall time per item.
            memory_limit: bytes of address space per worker, 0 for none.
            options: what the judge's prepare() is called with, by name; plain data.
            folder: one that the judges use; the pool removes it when it is closed.
        """
        if workers < 1 or timeout <= 0:
            raise ValueError(f"a pool needs workers and time (workers {workers}, timeout {timeout})")
        self._folder = folder
        self._start = lambda: _Worker(judge_module, timeout, memory_limit, options or {})
        self._workers = [self._start() for _ in range(workers)]

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item, in order. Not to be called from two threads at once.

        Raises:
            RuntimeError: a worker cannot start (its own traceback is on stderr), or the pool is closed.
        """
        if not self._workers:
            raise RuntimeError("the reward workers are closed")
        self._workers = [self._start() if worker.abandoned() else worker for worker in self._workers]
        verdicts: dict[int, Verdict] = {}
        queue = deque(enumerate(items))
        while len(verdicts) < len(items):
            self._hand_out(queue)
            wait([worker.pipe for worker in self._workers], timeout=self._until_next_deadline())
            for slot, worker in enumerate(self._workers):
                failure = self._collect(worker, verdicts)
                if failure:
                    self._workers[slot] = self._replace(worker, failure, verdicts, queue)
        return [verdicts[index] for index in range(len(items))]

    def _hand_out(self, queue: deque[tuple[int, Item]]) -> None:
        """A chunk for every free worker.

        Long enough to hide the pipe, short enough that all workers finish together.
        """
        for slot, worker in enumerate(self._workers):
            if not queue:
                return
            if worker.ready and not worker.pending:
                if not worker.alive():  # killed while idle, by the system: nobody's fault
                    worker.kill()
                    self._workers[slot] = self._start()
                    continue
                length = max(1, min(LARGEST_CHUNK, len(queue) // (4 * len(self._workers))))
                worker.give([queue.popleft() for _ in range(length)])

    def _until_next_deadline(self) -> float:
        """Seconds; at most a second, which only bounds how long a wrong clock could hold us."""
        now = time.monotonic()
        return max(0.0, min(1.0, min(worker.deadline() for worker in self._workers) - now))

    def _collect(self, worker: _Worker, verdicts: dict[int, Verdict]) -> str | None:
        """Take what the worker has sent.

        Returns why it must be replaced, or None. Answers that came late but came are kept.
        """
        try:
            verdicts.update(worker.receive())
        except (EOFError, OSError, pickle.UnpicklingError):
            return CRASH
        return TIMEOUT if time.monotonic() > worker.deadline() else None

    def _replace(
        self, worker: _Worker, failure: str, verdicts: dict[int, Verdict], queue: deque[tuple[int, Item]]
    ) -> _Worker:
        """Blame the item the worker was at, give the others back, and start a new worker."""
        worker.kill()
        if not worker.ready:
            self.close()
            raise RuntimeError(
                f"a reward worker did not start ({failure}, exit code {worker.process.returncode}); "
                "its error is on stderr"
            )
        if worker.pending:
            index, _ = worker.pending.popleft()
            verdicts[index] = Verdict(0.0, failure)
            queue.extendleft(reversed(worker.pending))
        return self._start()

    def close(self) -> None:
        """End the workers at once; they hold nothing worth saving."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process, the items it has been given, and since when it has been at the first of them."""

    def __init__(self, judge_module: str, timeout: float, memory_limit: int, options: dict):
        self.pipe, theirs = Pipe()
        arguments = [
            json.dumps([entry for entry in sys.path if isinstance(entry, str)]),
            theirs.fileno(),
            judge_module,
            timeout,
            memory_limit,
            json.dumps(options),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *map(str, arguments)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()
        self.ready = False
        self.pending: deque[tuple[int, Item]] = deque()
        self._since = time.monotonic()
        self._timeout = timeout

    def alive(self) -> bool:
        return self.process.poll() is None

    def abandoned(self) -> bool:
        """Whether items of an earlier, interrupted call are still inside; ends the process if so."""
        if self.pending:
            self.kill()
        return bool(self.pending)

    def deadline(self) -> float:
        """On the clock of time.monotonic(); infinity when nothing is expected from the worker."""
        if not self.ready:
            return self._since + START_LIMIT
        return self._since + self._timeout if self.pending else float("inf")

    def give(self, chunk: list[tuple[int, Item]]) -> None:
        """Send a chunk to a worker that is ready and has none. A worker that died shows in the next `receive`."""
        self.pending.extend(chunk)
        self._since = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(chunk)

    def receive(self) -> dict[int, Verdict]:
        """Whatever has arrived.

        Does not wait. Raises EOFError or OSError once everything is read and the worker is gone.
        """
        verdicts = {}
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, float):
                    self.ready, self._since = True, message
                else:
                    index, verdict, self._since = message
                    self.pending.popleft()
                    verdicts[index] = Verdict(*verdict)
        except (EOFError, OSError):
            if not verdicts:
                raise  # otherwise the next call raises: no verdict is lost
        return verdicts

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()
