"""The places that metrics go to, read back with the tools of those who read them."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.training.sinks import JsonLines, MetricsFile, TensorBoard, WeightsAndBiases


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_appended_and_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.jsonl"
    first = JsonLines(path)
    first.write({"text": "ä\u2028b"})
    assert path.read_text(encoding="utf-8") == '{"text": "ä\u2028b"}\n'
    first.close()
    with JsonLines(path) as second:
        second.write({"n": 2})
    assert path.read_text(encoding="utf-8") == '{"text": "ä\u2028b"}\n{"n": 2}\n'


@pytest.mark.parametrize("left, expected", [("", ""), ('{"a": 1}\n', '{"a": 1}\n'), ('{"a": 1', '{"a": 1\n')])
def test_a_line_that_was_cut_spoils_no_other(tmp_path: Path, left: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(left)
    with JsonLines(path) as again:
        again.write({"b": 2})
    assert path.read_text() == expected + '{"b": 2}\n'


def test_a_metrics_file_has_a_line_per_step(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "m.jsonl")
    sink.record(3, {"train/loss": 0.5})
    sink.record(4, {"train/loss": 0.25, "perf/step_time": 1.0})
    sink.close()
    first, second = lines(tmp_path / "m.jsonl")
    assert {name: first[name] for name in ("step", "train/loss")} == {"step": 3, "train/loss": 0.5}
    assert second["perf/step_time"] == 1.0 and 0 <= first["seconds"] <= second["seconds"]


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_scalars_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = {"sft": {"lr": 1e-3, "data_path": ["ä.jsonl"]}}
    sink = TensorBoard(str(tmp_path), settings)
    for step in (1, 2, 7):
        sink.record(step, {"train/loss": 1 / step, "perf/step_time": float(step)})
    sink.close()
    found = events(tmp_path)
    assert sorted(found.Tags()["scalars"]) == ["perf/step_time", "train/loss"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 7)
    ]
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == settings


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for run, steps in ((1.0, (1, 2, 3, 4)), (2.0, (3, 4, 5))):
        sink = TensorBoard(str(tmp_path), {})
        for step in steps:
            sink.record(step, {"train/loss": run})
        sink.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)
    ]  # fmt: skip


def test_tensorboard_writes_nothing_for_a_run_without_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    TensorBoard(str(tmp_path / "tb"), {}).close()
    assert not (tmp_path / "tb").exists()


class FakeWandb(types.ModuleType):
    """What is used of wandb, recording its calls."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None) -> None:
        super().__init__("wandb")
        self.refusal, self.started, self.logged, self.finished = refusal, None, [], 0

    def init(self, **settings):
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.started = settings
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_settings_and_metrics(tmp_path: Path, monkeypatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WeightsAndBiases("project", "name", str(tmp_path / "w"), {"sft": {"lr": 1.0}})
    sink.record(2, {"train/loss": 0.5})
    sink.close()
    assert fake.started == {
        "project": "project", "name": "name", "dir": str(tmp_path / "w"), "config": {"sft": {"lr": 1.0}}
    }  # fmt: skip
    assert fake.logged == [(2, {"train/loss": 0.5})] and fake.finished == 1 and (tmp_path / "w").is_dir()


@pytest.mark.parametrize("refusal, said", [("no key.\nmore", "(no key)"), ("", "(it gives no reason)")])
def test_a_refusal_of_weights_and_biases_is_told(monkeypatch, refusal: str, said: str) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refusal))
    with pytest.raises(ConfigError) as error:
        WeightsAndBiases("p", None, None, {})
    assert str(error.value) == (
        f"--wandb-project p: Weights & Biases refuses the run {said}. Run wandb login, or set WANDB_MODE=offline."
    )


def test_a_missing_package_is_told_in_a_sentence(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(DependencyError, match="--wandb-project needs the wandb package.* Run: pip install wandb$"):
        WeightsAndBiases("p", None, None, {})
    with pytest.raises(DependencyError, match="--tensorboard-dir needs .* Run: pip install tensorboard$"):
        TensorBoard(str(tmp_path), {})
