"""What is read back from a metrics file, whatever happened to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dlm.training.history import read_history, series


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = [{"step": n, "seconds": 0.5, "train/loss": 1 / n} for n in (1, 2, 3)]
    assert read_history(write(tmp_path / "m.jsonl", *records)) == records


@pytest.mark.parametrize(
    "steps, kept",
    [
        ([1, 2, 3, 4], [0, 1, 2, 3]),
        ([1, 2, 3, 3, 4], [0, 1, 3, 4]),
        ([1, 2, 3, 4, 2, 3], [0, 4, 5]),  # resumed after step 1: the old steps 2, 3 and 4 never led anywhere
        ([0, 1, 2, 5, 2, 3, 1, 2], [0, 6, 7]),  # resumed twice
        ([3, 4, 1], [2]),
    ],
)
def test_what_was_recorded_later_counts(tmp_path: Path, steps: list[int], kept: list[int]) -> None:
    records = [{"step": step, "line": line} for line, step in enumerate(steps)]
    found = read_history(write(tmp_path / "m.jsonl", *records))
    assert [record["line"] for record in found] == kept
    assert [record["step"] for record in found] == sorted({steps[line] for line in kept})


def test_lines_that_hold_no_record_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", {"step": 1, "a": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "a": 2.\n\n[1, 2]\n"text"\n{"a": 5.0}\n{"step": "3"}\n\xff\xfe\n{"step": 4, "a": 4.0}')
    assert read_history(path) == [{"step": 1, "a": 1.0}, {"step": 4, "a": 4.0}]


def test_a_series_has_the_steps_at_which_there_was_a_number() -> None:
    values = [1.0, None, float("nan"), float("inf"), "2", True, 3]
    records = [{"step": n, "a": value} for n, value in enumerate(values)] + [{"step": 9}]
    assert series(records, "a") == ([0, 6], [1.0, 3.0])
    assert series(records, "a", 100) == ([0, 6], [100.0, 300.0])
    assert series(records, "b") == ([], [])
