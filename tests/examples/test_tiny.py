"""Every example at SIZE=tiny, for real: the literal line of torchrun, bash alone, and the commands of the others.

What bash decides is recorded (recorder.py) and run by the command server, which has imported everything already.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.command_server import command_server
from tests.examples.recorder import EXAMPLES, ROOT, Recorder, environment, finish

LITERAL = "--nnodes=1 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0".split()
ONE_STEP = {"STEPS": "1", "STEPS1": "1", "STEPS2": "1", "WARMUP": "0"}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_of(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the literal line was run: below it lies what all tiny examples share, made by that run."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "examples").symlink_to(EXAMPLES)
    words = [sys.executable, "-m", "torch.distributed.run", *LITERAL, "examples/tracerl_8b.sh"]
    env = environment(SIZE="tiny", **ONE_STEP)
    done = finish(words, folder, env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tensor x pipeline x data parallel 1 x 1 x 2" in done.stdout
    assert done.stdout.count("Wrote 200 supervised samples") == 1
    return folder


@pytest.fixture
def run(place, tmp_path):
    """run(script, ranks, **settings): what the script would start, started; returns the commands."""

    def start(script: str, ranks: int = 1, **settings: str) -> list[str]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        recorder = Recorder(folder)
        recorder.work = place
        recorder.start(script, SIZE="tiny", NPROC_PER_NODE="1", **ONE_STEP | settings)
        (call,) = recorder.calls
        done = command_server().run(call.command, place, ranks=ranks, limit=600)
        assert done.codes == [0] * ranks, done.stdout + done.stderr
        return call.command

    return start


def test_the_literal_line_of_torchrun(place) -> None:
    save = place / "runs" / "tiny" / "tracerl_8b"
    assert step_of(save) == 1 and (save / "iter_0000001" / "tokenizer").is_dir()
    (record,) = [record for record in metrics(save) if record["step"] == 1]
    assert record["train/grad_norm"] > 0


def test_without_python_and_with_a_checkpoint_of_a_run(place) -> None:
    """--no-python, and another example that reads what the first has saved."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--no-python"]
    env = environment(SIZE="tiny", PYTHON=sys.executable, CHECKPOINT="runs/tiny/tracerl_8b")
    words = [*words, "examples/evaluate.sh", "--eval-num-prompts", "4"]
    done = finish(words, place, env)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = metrics(place / "runs" / "tiny" / "evaluate")
    assert record["step"] == 2 and record["eval/static/responses"] == 4  # two updates in its RL step


def test_bash_alone(place) -> None:
    """From a folder that is neither the project's nor the one with the tiny files."""
    env = environment(SIZE="tiny", PYTHON=sys.executable, TINY=str(place / "runs" / "tiny"), **ONE_STEP)
    words = ["bash", EXAMPLES / "sft_8b.sh", "--log-interval", "1"]
    done = finish(words, Path("/"), env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lm loss" in done.stdout and step_of(place / "runs" / "tiny" / "sft_8b") == 1


def test_the_value_model(place, run) -> None:
    run("tracerl_8b_value.sh")
    save = place / "runs" / "tiny" / "tracerl_8b_value"
    assert step_of(save) == 1 and step_of(save / "value") == 1
    assert metrics(save)[-1]["value/grad_norm"] > 0


def test_a_mixture_of_experts_on_two_processes(place, run) -> None:
    command = run("tracerl_30b_a3b.sh", ranks=2, EP="2")
    assert command[command.index("--expert-model-parallel-size") + 1] == "2"
    assert step_of(place / "runs" / "tiny" / "tracerl_30b_a3b") == 1


def test_block_expansion_in_two_phases(place, run) -> None:
    save = place / "runs" / "tiny" / "block_expansion_8b"
    first = run("block_expansion_8b.sh")
    assert first[first.index("--config") + 1] == str(ROOT / "configs" / "block_expansion_4_to_8_phase1.yaml")
    assert step_of(save / "phase1") == 1 and not (save / "phase2").exists()
    second = run("block_expansion_8b.sh")
    assert second[second.index("--load") + 1] == "runs/tiny/block_expansion_8b/phase1"
    assert step_of(save / "phase2") == 1
    assert "eval/dynamic-block8/accuracy" in metrics(save / "phase2")[0]
