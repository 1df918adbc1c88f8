"""The data tools as a user runs them: what they write, and how they end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.data.indexed import IndexedSamples
from megatron_dlm.data.sft_data import load_sft
from megatron_dlm.data.tokenizer import Tokenizer

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def _run(tool, *arguments, cwd):
    return subprocess.run([sys.executable, TOOLS / tool, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_quickstart_then_a_tokenizer_on_its_data(tmp_path):
    done = _run("make_quickstart_data.py", "--output", "data", "--num-train", 30, "--num-test", 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Wrote 30 supervised samples")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "sft.jsonl",
        "prompts.jsonl",
        "heldout.jsonl",
        "tokenizer",
    }
    done = _run(
        "train_tokenizer.py",
        "--input",
        "data/sft.jsonl",
        "--vocab-size",
        260,
        "--output",
        "t",
        "--add-token",
        "\\boxed{",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(Tokenizer(tmp_path / "t").encode("\\boxed{12")) == 3


def test_sentencepiece(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("12+34=46\nso \\boxed{46}\n")
    arguments = ["--input", "text.txt", "--vocab-size", 290, "--output", "t", "--add-token", "\\boxed{"]
    done = _run("train_tokenizer.py", "--type", "sentencepiece", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t" / "tokenizer.model").is_file()
    assert len(Tokenizer(tmp_path / "t").encode("\\boxed{12")) == 3


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        (
            "make_quickstart_data.py",
            ["--output", "d", "--source", "none.jsonl"],
            "DataError: The data file none.jsonl does not exist",
        ),
        ("make_quickstart_data.py", ["--output", "d", "--num-train", "99999"], "ConfigError: There are 125580 sums"),
        (
            "train_tokenizer.py",
            ["--input", "none.txt", "--vocab-size", "300", "--output", "t"],
            "DataError: The text file none.txt cannot be read",
        ),
        (
            "train_tokenizer.py",
            ["--input", "none.txt", "--vocab-size", "3", "--output", "t"],
            "ConfigError: A vocabulary of 3 is too small",
        ),
    ],
)
def test_mistakes_end_in_a_sentence(tool, arguments, words, tmp_path):
    done = _run(tool, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_preprocess_under_the_name_that_megatron_gives_it(tmp_path):
    done = _run("make_quickstart_data.py", "--output", "data", "--num-train", 20, "--num-test", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ("--input", "data/sft.jsonl", "--tokenizer-model", "data/tokenizer", "--workers", 1)
    done = _run("preprocess_data.py", *words, "--output", "indexed", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("20 samples of "), done.stderr
    found = IndexedSamples(str(tmp_path / "indexed"), Tokenizer(tmp_path / "data" / "tokenizer"), None)
    read, left_out = load_sft([str(tmp_path / "data" / "sft.jsonl")], Tokenizer(tmp_path / "data" / "tokenizer"))
    assert [found[n] for n in range(len(found))] == read and left_out == 0
    done = _run("preprocess_data.py", *words[:2], "--output", "indexed", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
