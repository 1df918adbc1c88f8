"""The pool: every item gets a verdict in its place, whatever the others do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.workers import WorkerPool

JUDGES = "tests.rewards.judges"


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(JUDGES, workers=2, timeout=1.5) as pool:
        yield pool


def _easy(n, start=0):
    return [(str(i), str(i) if i % 2 else "x", {}) for i in range(start, start + n)]


def _expected(n, start=0):
    return [Verdict(float(i % 2), str(i)) for i in range(start, start + n)]


@pytest.mark.parametrize("n", [0, 1, 2, 33, 500])
def test_order_is_kept(pool, n):
    assert pool.judge(_easy(n)) == _expected(n)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("hang", "timeout"),
        ("sleep 60", "timeout"),
        ("exit", "crash"),
        ("raise", "crash: ValueError"),
        ("quit", "crash: SystemExit"),
        ("eat", "crash: MemoryError"),
    ],
)
@pytest.mark.parametrize("place", [0, 150])
def test_one_bad_item_leaves_the_others_alone(pool, bad, reason, place):
    verdicts = pool.judge(_easy(place) + [(bad, "", {})] + _easy(200 - place, place))
    assert verdicts[place] == Verdict(0.0, reason)
    assert verdicts[:place] + verdicts[place + 1 :] == _expected(200)


def test_only_bad_items(pool):
    reasons = [
        verdict.reason
        for verdict in pool.judge([("exit", "", {}), ("hang", "", {}), ("exit", "", {}), ("hang", "", {})])
    ]
    assert reasons == ["crash", "timeout", "crash", "timeout"]


def test_the_limit_is_per_item_not_per_chunk(pool):
    items = [("sleep 0.1", "", {})] * 40  # 2 seconds per worker, under a limit of 1.5
    assert [verdict.reason for verdict in pool.judge(items)] == ["sleep 0.1"] * 40


def test_long_responses_pass(pool):
    items = [(str(i) * 500_000, str(i) * 500_000, {"i": i}) for i in range(10)]
    assert [verdict.correct for verdict in pool.judge(items)] == [1.0] * 10


def test_workers_stay_and_know_nothing_of_the_caller(pool):
    import torch  # noqa: F401  (the caller has it)

    pids = {verdict.reason for verdict in pool.judge([("pid", "", {})] * 50)}
    assert str(os.getpid()) not in pids and 1 <= len(pids) <= 2
    assert pids >= {verdict.reason for verdict in pool.judge([("pid", "", {})])}
    assert pool.judge([("modules", "", {})]) == [Verdict(0.0, "")]


def test_a_worker_killed_while_idle_is_replaced(pool):
    for pid in {verdict.reason for verdict in pool.judge([("pid", "", {})] * 50)}:
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.2)
    assert pool.judge(_easy(10)) == _expected(10)


def test_a_worker_that_was_stopped_costs_one_item(pool):
    (pid,) = {verdict.reason for verdict in pool.judge([("pid", "", {})])}
    os.kill(int(pid), signal.SIGSTOP)
    verdicts = pool.judge(_easy(100))
    wrong = [verdict for verdict, expected in zip(verdicts, _expected(100), strict=True) if verdict != expected]
    assert wrong in ([], [Verdict(0.0, "timeout")])


def test_an_interrupted_call_leaves_nothing_behind(pool, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.judge([("sleep 0.2", "", {})] * 4)
    assert pool.judge(_easy(10)) == _expected(10)


def test_workers_end_with_their_parent():
    program = (
        "import os; from megatron_dlm.rewards.workers import WorkerPool\n"
        f"pool = WorkerPool('{JUDGES}', 2, 5.0)\n"
        "print(pool.judge([('pid', '', {})])[0].reason, flush=True)\n"
        "os._exit(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # reading to the end of their common stdout waits for the workers, too
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert int(done.stdout) > 0
    deadline = time.monotonic() + 20  # a process closes its files a moment before it is gone
    while _runs(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid):
    """Whether a process exists and has not ended (an orphan that nobody reaps stays in the table as 'Z')."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_close_ends_the_processes():
    with WorkerPool(JUDGES, workers=1, timeout=5.0) as pool:
        (verdict,) = pool.judge([("pid", "", {})])
        os.kill(int(verdict.reason), 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(verdict.reason), 0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.judge(_easy(1))


@pytest.mark.parametrize("module", ["tests.rewards.broken_judge", "tests.rewards.no_such_judge"])
def test_a_judge_that_cannot_be_imported(module, capfd):
    with WorkerPool(module, workers=2, timeout=5.0) as pool, pytest.raises(RuntimeError, match="did not start"):
        pool.judge(_easy(3))
    assert "broken on purpose" in (err := capfd.readouterr().err) or "no_such_judge" in err


@pytest.mark.parametrize(("workers", "timeout"), [(0, 1.0), (1, 0.0)])
def test_no_workers_no_time(workers, timeout):
    with pytest.raises(ValueError, match="workers and time"):
        WorkerPool(JUDGES, workers, timeout)
