"""Runs that stop and go on, as a person or a scheduler does it: exit intervals, SIGTERM, SIGKILL within a save."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.command_server import Started, command_server
from tests.test_commands import MODEL, ROOT, command, data  # noqa: F401 (fixtures)
from tests.tiny import one_process

TRAIN = ["--global-batch-size", 16, "--lr", 5e-3, "--lr-decay-style", "cosine", "--lr-warmup-iters", 2, "--seed", 1]


def flags(data: Path) -> list:
    """Of an SFT run; without what a checkpoint knows."""
    return ["sft", "--data-path", data / "sft.jsonl", *TRAIN]


def shape(data: Path) -> list:
    return [*MODEL, "--tokenizer-model", data / "tokenizer"]


def saved_iterations(folder: Path) -> list[int]:
    return sorted(int(entry.name[5:]) for entry in folder.iterdir() if entry.name.startswith("iter_"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, optimizer state included."""
    from megatron_dlm import platform

    one_process()
    from megatron.core import dist_checkpointing

    with platform.cuda_calls_on_cpu():
        content = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def start(data, tmp_path_factory):  # noqa: F811
    """A run without end that saves after every step; ended when the test is."""
    running = []

    def begin(save: Path) -> Started:
        words = [*flags(data), *shape(data), "--train-iters", 10**6, "--save", save, "--save-interval", 1]
        output = tmp_path_factory.mktemp("said") / "here"
        running.append(process := command_server().start([str(word) for word in words], ROOT, output))
        wait_for(lambda: (save / "iter_0000002").exists() or process.wait() is not None)
        assert process.wait() is None, process.said()
        return process

    yield begin
    for process in running:
        process.kill()


def wait_for(condition, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.0005)


def in_the_middle_of_a_save(folder: Path) -> None:
    """Returns when a checkpoint is being written (its folder has appeared, and is not in its place)."""
    wait_for(lambda: not list(folder.glob(".iter_*.partial")))
    wait_for(lambda: list(folder.glob(".iter_*.partial")))


def go_on(data: Path, folder: Path, extra: int) -> subprocess.CompletedProcess:  # noqa: F811
    """Resume with no word about model and tokenizer; they are in the checkpoint."""
    last = int((folder / "latest_checkpointed_iteration.txt").read_text()) + extra
    return command(*flags(data), "--train-iters", last, "--load", folder, "--save", folder)


def test_stopped_and_resumed_leaves_the_same_checkpoint(tmp_path, data) -> None:  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    keep = ["--train-iters", 7, "--save-interval", 2, "--keep-last-n", 2]
    command(*flags(data), *shape(data), *keep, "--save", whole)
    assert saved_iterations(whole) == [6, 7]
    result = command(*flags(data), *shape(data), *keep, "--exit-interval", 3, "--save", parts)
    assert "Stopping after --exit-interval 3, at step 3." in result.stdout and saved_iterations(parts) == [2, 3]
    command(*flags(data), *keep, "--load", parts, "--save", parts)  # no word about model and tokenizer
    assert saved_iterations(parts) == [6, 7]
    command(*flags(data), *keep, "--load", whole, "--ckpt-step", 6, "--save", tmp_path / "again")
    expected = tensors(whole / "iter_0000007")
    for folder in (parts, tmp_path / "again"):
        found = tensors(folder / "iter_0000007")
        assert found.keys() == expected.keys() and len(found) > 30
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_sigterm_in_the_middle_of_a_save(tmp_path, data, start) -> None:  # noqa: F811
    """To the whole job, writer processes included, as a scheduler sends it: the save is finished, and one more made."""
    process = start(tmp_path)
    in_the_middle_of_a_save(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    code, (out, err) = process.wait(300.0), process.said()
    assert code == 128 + signal.SIGTERM and "Traceback" not in err, err
    latest = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert f"Stopping on SIGTERM, at step {latest}." in out
    assert f"Saved iteration {latest + 2} " in go_on(data, tmp_path, 2).stdout


@pytest.mark.parametrize("again", range(2))
def test_death_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, data, start, again: int) -> None:  # noqa: F811
    process = start(tmp_path)
    in_the_middle_of_a_save(tmp_path)
    process.kill()
    assert process.code == -signal.SIGKILL
    latest = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert (tmp_path / f"iter_{latest:07d}").is_dir()
    assert f"Saved iteration {latest + 2} " in go_on(data, tmp_path, 2).stdout
    assert not list(tmp_path.glob(".iter_*.partial"))
