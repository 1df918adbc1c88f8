"""The parts of the suite of GPU figures, at toy sizes on the CPU, and what becomes of one in which something fails."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks.gpu_figures import PARTS, Sheet
from benchmarks.gpu_report import markdown_of, summary
from megatron_dlm.config.errors import UserError
from megatron_dlm.config.model import ModelConfig
from tests.harness import pool
from tests.tiny import leave_job


@pytest.mark.parametrize("part", ["training-8b", "step", "curves", "head"])
def test_a_part_fills_its_sheet(part: str, tmp_path, monkeypatch) -> None:
    from benchmarks import gpu_parts, gpu_step, gpu_training

    monkeypatch.setattr(gpu_training, "peak_flops", lambda: (1e9, "made up"))
    monkeypatch.setattr(gpu_step, "_judge", lambda count, words: 0.25)  # a pool of processes, tested elsewhere
    monkeypatch.setattr("benchmarks.memory.gc", SimpleNamespace(collect=lambda: 0))  # slow beside so many modules
    leave_job()
    out = tmp_path / "figures.json"
    gpu_parts.measure(part, "tiny", "cpu", out)
    leave_job()
    found = json.loads(out.read_text())
    assert set(found) == {figure.key for figure in PARTS[part].figures}
    values = {key: one["value"] for key, one in found.items() if "value" in one}
    missing = {key: one["why"] for key, one in found.items() if "why" in one}
    # All that needs Transformer Engine says so, and nothing else is missing.
    assert all(
        "needs a GPU" in why for key, why in missing.items() if key.startswith(("te", "fp8")) and "gain" not in key
    )
    if part == "training-8b":
        if "bf16 model" in values:  # on a machine with much else to do, more layers may not have been slower
            assert values["bf16 hardware"] > values["bf16 model"] > 0
        else:
            assert "not slower" in missing["bf16 model"]
    elif part == "step":
        assert values["bf16 largest"] < 1e-4 and values["bf16 largest"] >= values["bf16 mean"] > 0
        assert values["reward"] == 0.25 and values["refit shared"] > 0
        assert all(values[phase] > 0 for phase in ("rollout", "rows", "old log-probs", "forward+backward", "optimizer"))
    elif part == "curves":
        assert values["noise"] > 0 and values["bf16"] == pytest.approx(values["bf16 again"], rel=0.2)
    else:
        assert values["chunk time"] > 0


def test_what_goes_wrong_in_a_part_is_its_reason(tmp_path, monkeypatch) -> None:
    from benchmarks import gpu_parts

    def broken(size, device, sheet) -> None:
        sheet.put("bf16", 2.5)
        raise RuntimeError("no\nroom")

    monkeypatch.setitem(gpu_parts.RUN, "curves", broken)
    with pytest.raises(RuntimeError):
        gpu_parts.measure("curves", "tiny", "cpu", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    others = [figure.key for figure in PARTS["curves"].figures if figure.key != "bf16"]
    assert found == {"bf16": {"value": 2.5}, **{key: {"why": "no room"} for key in others}}
    table = markdown_of({"parts": {"curves": {"figures": found, "why": None, "seconds": 1.0, "about": ABOUT}}})
    assert table.count("no room") == len(found) - 1 and "2.5 nats" in table and "H200, driver 1" in table


ABOUT = dict(
    device="1 x H200", driver="1", python="3", versions={}, date="today", revision="abc", size="h200", command="it"
)


@pytest.mark.parametrize("distance, ratio, reached", [(-0.03, 1.5, False), (0.01, 0.5, True)])
def test_a_curve_in_another_precision_is_held_against_the_noise(tmp_path, distance, ratio, reached) -> None:
    from benchmarks.gpu_step import put_in_noise

    sheet = Sheet(tmp_path / "out.json")
    put_in_noise("fp8", distance, 0.02, sheet)
    assert sheet.figures["fp8 in noise"]["value"] == pytest.approx(ratio)
    found = {"figures": sheet.figures, "why": None, "seconds": 1.0, "about": ABOUT}
    assert f"(aim: at most 1, {'reached' if reached else 'missed'})" in summary({"parts": {"curves": found}})
    put_in_noise("te", distance, 0.0, sheet)
    assert "no noise" in sheet.figures["te in noise"]["why"]


@pytest.mark.parametrize("slices, whole, gain", [((1, 3), 5, 2.2 / 1.3), ((2,), 2, 2.0)])
def test_what_fp8_gains_is_that_of_the_whole_model(slices, whole, gain, tmp_path, monkeypatch) -> None:
    """Each layer takes 0.4 s, 0.2 s in FP8; all the rest 0.2 s, 0.3 s in FP8, or nothing where only one size is run."""
    from benchmarks import gpu_training
    from benchmarks.gpu_training import Measured, Work

    def measured(model, parallel, traces, repeats) -> Measured:
        layer, rest = (0.2, 0.3) if parallel.fp8_format else (0.4, 0.2)
        seconds = model.num_layers * layer + (rest if len(slices) == 2 else 0.0)
        return Measured(Work(1e9 * model.num_layers, 1e9 * model.num_layers, 10), seconds, seconds, 2**30)

    monkeypatch.setattr(gpu_training, "peak_flops", lambda: (1e10, "made up"))
    monkeypatch.setattr(gpu_training, "measure", measured)
    sheet = Sheet(tmp_path / "out.json")
    from benchmarks.gpu_sizes import TOY as MODEL

    gpu_training.report(ModelConfig(**MODEL), slices, None, 1, sheet, whole)
    assert sheet.figures["fp8 gain"]["value"] == pytest.approx(gain)
    assert sheet.figures["bf16 model"]["value"] == pytest.approx(25.0), "of the layers"


def test_what_is_no_lack_ends_a_part_when_it_is_through(tmp_path, monkeypatch) -> None:
    """A library that fails in FP8, and one setting that this machine cannot have; what needs neither is measured."""
    from benchmarks import gpu_parts, gpu_step, gpu_training
    from benchmarks.gpu_training import Measured, Work

    def fails(in_fp8: bool, fused: bool) -> None:
        if in_fp8:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        if fused:
            raise UserError("no Transformer Engine here")

    def measured(model, parallel, *rest) -> Measured:
        fails(bool(parallel.fp8_format), parallel.transformer_impl == "transformer_engine")
        return Measured(Work(1e9 * model.num_layers, 1e9, 10), model.num_layers, model.num_layers, 2**30)

    def curve(model, parallel, steps, later) -> tuple[float, str]:
        fails(bool(parallel.fp8_format), parallel.transformer_impl == "transformer_engine")
        return 1.0 + 0.001 * later, "note"

    def differences(precision, job, sheet, repeats, name=None) -> list:
        fails(precision == "fp8", False)
        sheet.put(f"{name or precision} mean", 0.5)
        return []

    monkeypatch.setattr(gpu_training, "peak_flops", lambda: (1e10, "made up"))
    monkeypatch.setattr(gpu_training, "measure", measured)
    monkeypatch.setattr(gpu_step, "_curve", curve)
    monkeypatch.setattr(gpu_step, "_differences", differences)
    monkeypatch.setattr(gpu_step, "_judge", lambda count, words: 0.25)
    parts = {"training-8b": ("bf16 model", "te model"), "curves": ("bf16", "te"), "step": ("rollout fp8 mean", None)}
    for part, (known, lacking) in parts.items():
        out = tmp_path / f"{part}.json"
        with pytest.raises(RuntimeError, match="CUBLAS"):
            gpu_parts.measure(part, "tiny", "cpu", out)
        found = json.loads(out.read_text())
        assert "value" in found[known] and any("CUBLAS" in one.get("why", "") for one in found.values())
        assert lacking is None or "no Transformer Engine" in found[lacking]["why"]


def moved() -> int:
    """Bytes that a refit moves to this rank."""
    from benchmarks.gpu_sizes import size_named
    from benchmarks.gpu_step import refit_once
    from megatron_dlm.parallel import groups

    found = refit_once(size_named("tiny").refit, 2, 1)
    groups.destroy()
    assert found.seconds > 0
    return found.bytes


def test_a_refit_between_layouts_moves_all_that_is_divided() -> None:
    found = pool(2).run(moved)
    pool(2).close()  # it has left its job
    layer = (4 + 2 * 2) * 8 * 32 + 4 * 8 * 32 + 3 * 48 * 32  # query, key and value; projection; the unit with a gate
    assert found == [4 * (2 * 64 * 32 + 2 * layer)] * 2


def test_on_one_gpu_a_refit_copies_everything() -> None:
    from benchmarks.gpu_sizes import size_named
    from benchmarks.gpu_step import refit_once

    leave_job()
    found = refit_once(size_named("tiny").refit, 1, 1)
    leave_job()
    norms = (2 * 32 + 2 * 8) * 2 + 32  # before attention and the unit, of query and key; the last one
    layer = (4 + 2 * 2) * 8 * 32 + 4 * 8 * 32 + 3 * 48 * 32
    assert found.bytes == 4 * (2 * 64 * 32 + 2 * layer + norms) and found.seconds > 0
