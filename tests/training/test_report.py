"""A run's report as a whole: who speaks, what stands where at its end, and that nothing at its end breaks it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.training.report import Report, Stopwatch
from tests.training.test_curves import SFT, colours
from tests.training.test_sinks import FakeWandb, events, lines


def metrics_of(record: dict) -> dict:
    return {name: value for name, value in record.items() if name != "step"}


def run(records: list[dict], folder: Path | None = None, is_main: bool = True, **settings: object) -> Report:
    """A run that records these steps, from beginning to end."""
    with Report(LoggingConfig(progress_bar=False, **settings), is_main, {"a": {"b": 1}}, folder) as report:
        for record in records:
            report.record(record["step"], metrics_of(record))
    return report


def test_a_run_leaves_its_metrics_and_a_picture(tmp_path: Path, capsys) -> None:
    run(SFT, tmp_path / "save")
    assert [record["train/loss"] for record in lines(tmp_path / "save" / "metrics.jsonl")] == [3, 1.5, 1, 0.75, 0.6]
    assert colours(tmp_path / "save" / "curves.png") > 10
    assert capsys.readouterr().out == f"Curves: {tmp_path / 'save' / 'curves.png'}\n"


def test_everything_is_written_everywhere_once(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    file = tmp_path / "own" / "m.jsonl"
    run(SFT, tmp_path / "save", metrics_jsonl=str(file), wandb_project="p", tensorboard_dir=str(tmp_path / "tb"))
    assert [{name: line[name] for name in record} for line, record in zip(lines(file), SFT, strict=True)] == SFT
    assert fake.logged == [(record["step"], metrics_of(record)) for record in SFT] and fake.finished == 1
    assert [event.value for event in events(tmp_path / "tb").Scalars("train/grad_norm")] == [2, 3, 4, 5, 6]
    assert sorted(path.name for path in (tmp_path / "save").iterdir()) == ["curves.png"]
    assert not file.with_suffix(".png").exists()


def test_only_the_main_rank_writes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # nor does it look for packages
    report = run(
        SFT, tmp_path / "save", is_main=False, metrics_jsonl=str(tmp_path / "m.jsonl"), wandb_project="p",
        tensorboard_dir=str(tmp_path / "tb"),
    )  # fmt: skip
    report.say("hello")
    report.iteration(1, 2, {"loss": 1.0})
    report.keep_samples([{"a": 1}])
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize("given, left", [({}, []), ({"metrics_jsonl": "m.jsonl"}, ["m.jsonl", "m.png"])])
def test_without_a_folder_the_picture_stands_beside_the_metrics(tmp_path: Path, given: dict, left: list) -> None:
    run(SFT, **{name: str(tmp_path / value) for name, value in given.items()})
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_resumed_run_is_drawn_with_its_whole_history(tmp_path: Path, monkeypatch) -> None:
    """Steps 3 to 5 were lost and are done again: the later values count."""
    drawn = []
    monkeypatch.setattr("megatron_dlm.training.report.draw", lambda shown, *_: drawn.append(shown))
    run(SFT, tmp_path)
    run([record | {"train/lr": 7.0} for record in SFT[2:4]], tmp_path)
    (rate,) = (panel.curves[0] for panel in drawn[-1] if panel.title == "learning rate")
    assert (rate.steps, rate.values) == ([1, 2, 3, 4], [0.001, 0.002, 7.0, 7.0])
    assert len(lines(tmp_path / "metrics.jsonl")) == 7


def test_a_run_that_breaks_off_is_drawn_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Report(LoggingConfig(progress_bar=False), True, {}, tmp_path) as report:
        report.record(1, metrics_of(SFT[0]))
        1 / 0  # noqa: B018
    assert colours(tmp_path / "curves.png") > 10


@pytest.mark.parametrize("records", [[], [{"step": 60, "eval/dynamic/accuracy": 0.5}]], ids=["none", "evaluation"])
def test_without_training_steps_there_is_no_picture(tmp_path: Path, capsys, records: list[dict]) -> None:
    run(records, tmp_path)
    assert not (tmp_path / "curves.png").exists() and capsys.readouterr().out == ""


def test_a_run_that_has_nothing_left_to_do_leaves_the_picture_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in SFT))
    run([], tmp_path)
    assert not (tmp_path / "curves.png").exists() and capsys.readouterr().out == ""


def test_without_matplotlib_a_run_ends_with_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(SFT, tmp_path)
    assert capsys.readouterr().out == (
        "No picture of the curves: matplotlib is not installed. Run: pip install matplotlib\n"
    )
    assert len(lines(tmp_path / "metrics.jsonl")) == 5


def test_a_picture_that_cannot_be_written_costs_a_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "curves.png").mkdir()
    run(SFT, tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("No picture of the curves: ") and "curves.png" in said and said.count("\n") == 1


@pytest.mark.parametrize("name, flag", [("wandb", "wandb_project"), ("tensorboard", "tensorboard_dir")])
def test_a_missing_package_is_told_before_anything_is_written(tmp_path, monkeypatch, name: str, flag: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(DependencyError, match=f"pip install {name}"):
        run(SFT, tmp_path, **{flag: str(tmp_path / "x")})
    assert not list(tmp_path.iterdir())


def test_samples_are_appended_where_there_is_a_folder(tmp_path: Path) -> None:
    for number in (1, 2):
        with Report(LoggingConfig(progress_bar=False), True, {}, tmp_path) as report:
            report.keep_samples([{"n": number}, {"n": -number}])
    assert [json.loads(line)["n"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [1, -1, 2, -2]
    report = run([], metrics_jsonl=str(tmp_path / "elsewhere" / "m.jsonl"))
    report.keep_samples([{"n": 3}])
    assert report.samples is None and [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["m.jsonl"]


def test_the_log_line_is_that_of_megatron(capsys) -> None:
    with Report(LoggingConfig(progress_bar=False), True, {}) as report:
        report.iteration(7, 1000, {"loss": -0.25, "k3": 0.0000125, "steps": 3, "lr": "1E-3"})
    assert re.fullmatch(
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration        7/    1000 \| loss: -0\.2500 \| k3: 1\.250000E-05 \| "
        r"steps: 3 \| lr: 1E-3 \|\n",
        capsys.readouterr().out,
    )


def test_a_stopwatch_adds_up_what_is_entered_again(monkeypatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("megatron_dlm.training.report.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for name in ("rollout", "train", "rollout"):
        with watch.phase(name):
            pass
    assert watch.seconds == {"rollout": 3.0, "train": 3.0}
