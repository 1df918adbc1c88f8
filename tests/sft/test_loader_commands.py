"""A fine-tuning run that is killed while rows are prepared ahead, and goes on with another loader."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest

from tests.command_server import ROOT, command_server
from tests.sft.some_updates import is_running, spawned
from tests.test_commands import MODEL, command, data  # noqa: F401 (fixture)
from tests.test_stopping import wait_for

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
RUN = "--global-batch-size 16 --max-tokens-per-row 256 --lr 5e-3 --lr-decay-style constant --seed 1".split()


def records(path: Path) -> list[dict]:
    """Of the lines that are whole."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def seen(record: dict) -> tuple:
    """What tells whether a step was the same, to the last bit: of samples, masks, weights, and all steps before."""
    return tuple(record[f"train/{name}"] for name in ("loss", "nll", "grad_norm", "consumed_samples"))


def test_killed_and_gone_on_with_another_loader(tmp_path, data) -> None:  # noqa: F811
    """An epoch is 6.25 steps, a checkpoint 3."""
    base = ["sft", "--data-path", data / "sft.jsonl", *RUN]
    new = [*MODEL, "--tokenizer-model", data / "tokenizer"]
    keep = ["--save", tmp_path / "run", "--save-interval", 3]
    latest = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    legs = []
    for number, loader in enumerate((["--num-workers", 1], ["--dataloader-type", "dali"])):
        start = ["--load", tmp_path / "run"] if number else new
        log = tmp_path / f"{number}.jsonl"
        words = [*base, *start, *keep, *loader, "--train-iters", 10**6, "--metrics-jsonl", log]
        run = command_server().start([str(word) for word in words], ROOT, tmp_path / f"said-{number}")
        try:
            steps = random.randrange(4, 8)
            wait_for(lambda: len(records(log)) >= steps or run.wait() is not None)  # noqa: B023
            assert run.wait() is None, run.said()
            worker = spawned(run.pid)[0]  # others write checkpoints
            os.kill(run.pid, signal.SIGKILL)  # it alone
            assert run.wait(60.0) == -signal.SIGKILL
            wait_for(lambda: not is_running(worker), 30.0)  # noqa: B023
        finally:
            run.kill()
        legs.append(records(log))
    last = int(latest.read_text()) + 3
    for loaded, log in (["--load", tmp_path / "run"], "rest"), (new, "whole"):
        command(*base, *loaded, "--train-iters", last, "--metrics-jsonl", tmp_path / f"{log}.jsonl")
    whole = {record["step"]: seen(record) for record in records(tmp_path / "whole.jsonl")}
    legs.append(records(tmp_path / "rest.jsonl"))
    assert [leg[0]["step"] % 3 for leg in legs] == [1, 1, 1] and legs[2][-1]["step"] == last == len(whole)
    for leg in legs:
        for record in leg:
            if record["step"] <= last:
                assert seen(record) == whole[record["step"]], record["step"]
