"""Tables and curves from recorded metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.evaluation.report import minutes_of, reward_curve

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_minutes_are_those_of_the_steps(tmp_path: Path) -> None:
    records = [{"step": 0}, {"step": 1, "perf/step_time": 40.0}, {"step": 2, "perf/step_time": 50.0}]
    assert minutes_of(write(tmp_path / "m.jsonl", records)) == 1.5


def test_a_curve_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": n, "rollout/raw_reward": n / 4, "rollout/tokens_per_step": 1.0 + n} for n in range(4)]
    picture = reward_curve(write(tmp_path / "m.jsonl", records), tmp_path / "curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_a_run_without_rollouts_has_no_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="records no rollouts"):
        reward_curve(write(tmp_path / "m.jsonl", [{"step": 1, "train/loss": 2.0}]), tmp_path / "curve.png")


def test_the_quickstart_report_compares_its_three_models(tmp_path: Path) -> None:
    names = ("accuracy", "response_len", "tokens_per_step", "tokens_per_forward", "truncated_ratio", "responses")
    for stage, accuracy in (("sft", 0.25), ("sft-continued", 0.5), ("tracerl", 0.75)):
        write(
            tmp_path / f"eval-{stage}.jsonl",
            [{f"eval/dynamic/{name}": 1.0 for name in names} | {"eval/dynamic/accuracy": accuracy}],
        )
    write(
        tmp_path / "tracerl.jsonl",
        [{"step": 1, "perf/step_time": 90.0, "rollout/raw_reward": 1, "rollout/tokens_per_step": 2}],
    )
    command = [sys.executable, "tools/quickstart_report.py", "report", str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (
        "1.5 minutes of TraceRL +50.0 points, of more SFT +25.0 points" in said and (tmp_path / "reward.png").exists()
    )
