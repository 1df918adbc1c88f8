"""Mistakes as a shell, torchrun, Ctrl-C or a full disk bring them about: whole processes, started from outside."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_inputs import bench
from tests.bad_inputs.bench import BASES
from tests.command_server import OF_A_JOB, ROOT, Server

LIMIT = 300  # seconds until a process is given up, on a machine that has much else to do
PYTHON = [sys.executable, "-m", "megatron_dlm"]
LAUNCHER = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "megatron_dlm",
]


def start(words: list[str], folder: Path, limit: Callable[[], None] = lambda: None) -> subprocess.Popen:
    """Args: limit: called in the process before the program."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        limit()

    environment = {name: value for name, value in os.environ.items() if name not in OF_A_JOB}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


@pytest.mark.parametrize(
    "words, kind",
    [
        (BASES["sft"] + " --lr fast", "ConfigError"),
        (BASES["resume"] + " --load nowhere", "CheckpointError"),
    ],
)
def test_from_a_shell(words: str, kind: str, world: Path) -> None:
    process = start([*PYTHON, *shlex.split(words)], world)
    stdout, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and not stdout
    assert len(stderr.splitlines()) == 1 and stderr.startswith(f"{kind}: ")


def test_under_torchrun_a_mistake_is_told_once(world: Path) -> None:
    process = start([*LAUNCHER, *shlex.split(BASES["sft"] + " --save sft.jsonl")], world)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert stderr.startswith("ConfigError: --save sft.jsonl cannot be written to")
    assert stderr.count("ConfigError") == 1, stderr  # then the launcher speaks


def test_ctrl_c_is_one_line_and_loses_nothing(world: Path, server: Server, tmp_path: Path) -> None:
    before = bench.tree(world)
    words = shlex.split(BASES["sft"] + " --train-iters 100000 --log-interval 1")
    process = server.start(words, world, tmp_path / "said")
    while "iteration        3/" not in process.said()[0] and process.wait() is None:
        time.sleep(0.01)
    assert process.code is None, process.said()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(LIMIT) == 130
    assert process.said()[1].strip() == "Interrupted. What was saved can be resumed with --load."
    assert bench.lost(before, bench.tree(world), late=True) == []


def test_a_reader_that_has_gone(world: Path) -> None:
    """As in `megatron-dlm sft ... | head -1`."""
    process = start([*PYTHON, *shlex.split(BASES["sft"] + " --train-iters 100000 --log-interval 1")], world)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=LIMIT) == 128 + signal.SIGPIPE


def test_a_disk_that_is_full_when_a_checkpoint_is_written(world: Path) -> None:
    """Files may not grow beyond 20 kB, which the tensors of a checkpoint do."""
    before = bench.tree(world)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    process = start([*PYTHON, *shlex.split(BASES["resume"])], world, limit)
    stdout, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 2, stderr
    assert (
        stderr.startswith("ResourceError: The checkpoint ckpt/iter_0000003 could not be written")
        and len(stderr.splitlines()) == 1
    ), stderr
    assert "Saved" not in stdout
    assert bench.lost(before, bench.tree(world), late=True) == []
    assert (world / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "2"
