"""`trace` as a person starts it: step maps of a file, by one process and by two, killed and gone on with."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.command_server import command_server
from tests.test_commands import MODEL, ROOT, command, data, lines  # noqa: F401  (data is a fixture)


@pytest.fixture(scope="module")
def folder(data) -> Path:  # noqa: F811
    """A checkpoint of one step of fine-tuning, and 30 responses."""
    flags = ["--tokenizer-model", data / "tokenizer", "--data-path", data / "sft.jsonl", "--train-iters", 1]
    command("sft", *MODEL, *flags, "--lr", 1e-3, "--save", data / "ckpt")
    (data / "in.jsonl").write_text("".join((data / "sft.jsonl").read_text().splitlines(True)[:30]))
    return data


def words(folder: Path, name: str, *flags: object) -> list[str]:
    given = ["--load", folder / "ckpt", "--input", folder / "in.jsonl", "--output", folder / f"{name}.jsonl"]
    return [str(word) for word in ("trace", *given, "--fp64", "--lines-at-once", 1, *flags)]


@pytest.fixture(scope="module")
def traced(folder) -> list[dict]:
    said = command(*words(folder, "one", "--metrics-jsonl", folder / "metrics.jsonl"))
    assert "30 responses, 0 of them done; " in said.stdout and not said.stderr
    assert f"30 step maps in {folder / 'one.jsonl'}: " in said.stdout
    return lines(folder / "one.jsonl")


def test_the_file_is_what_score_reads(folder, traced) -> None:
    given = lines(folder / "in.jsonl")
    assert all(record.items() >= line.items() for record, line in zip(traced, given, strict=True))
    tokens = 0
    for record in traced:
        tokens += len(record["token_ids"])
        assert sorted(record["step_map"] + record["tail_step_map"]) == list(range(1, 1 + record["num_forwards"]))
        assert (len(record["prompt_token_ids"] + record["token_ids"] + record["tail_token_ids"])) % 4 == 0
        assert record["response"] == record["text"] and record["block_size"] == 4
    command(
        "score", "--load", folder / "ckpt", "--input", folder / "one.jsonl", "--output", folder / "s.jsonl", "--fp64"
    )
    for record in lines(folder / "s.jsonl"):
        np.testing.assert_allclose(record["trace_logprobs"], record["logprobs"], rtol=0, atol=1e-9)
    (metrics,) = lines(folder / "metrics.jsonl")
    assert (metrics["trace/lines"], metrics["trace/tokens"]) == (30, tokens)


def test_a_complete_file_is_not_written_again(folder, traced) -> None:
    said = command(*words(folder, "one"), expect=2).stderr
    assert f"--output {folder / 'one.jsonl'} is there already" in said and lines(folder / "one.jsonl") == traced


def test_two_processes_write_the_same_file(folder, traced) -> None:
    argv = words(folder, "two", "--lines-at-once", 7, "--tensor-model-parallel-size", 2, "--sequence-parallel")
    result = command_server().run(argv, ROOT, ranks=2)
    assert result.codes == [0, 0], result.stdout + result.stderr
    assert result.stdout.count("step maps in") == 1
    for one, other in zip(lines(folder / "two.jsonl"), traced, strict=True):
        np.testing.assert_allclose(one.pop("logprobs"), other["logprobs"], rtol=0, atol=1e-10)
        assert one.items() <= other.items()


def test_a_killed_run_goes_on_to_the_same_bytes(folder, traced) -> None:
    """Killed as soon as something is safe. Between the two, a run with other settings is refused."""
    argv, note = words(folder, "cut"), folder / "cut.jsonl.unfinished.json"
    started = command_server().start(argv, ROOT, folder / "cut-said")
    deadline = time.monotonic() + 120
    while started.wait() is None and time.monotonic() < deadline:
        if note.exists() and json.loads(note.read_text())["lines"]:
            started.kill()
        time.sleep(0.002)
    assert started.code in (-9, 0), started.said()  # a machine may be so slow in telling that the run has ended
    if started.code == -9:
        said = command(*words(folder, "cut", "--tokens-per-step", 2), expect=2).stderr
        assert "was begun with --tokens-per-step 1, and this run has 2." in said
        said = command(*argv).stdout
        assert "30 responses, 0 of them done" not in said and " of them done; " in said
    assert (folder / "cut.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes() and not note.exists()
