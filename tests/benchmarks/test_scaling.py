"""The study of scaling at a few points, and the calibration's output, which `--hardware` reads."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import calibrate, scaling
from benchmarks.scaling_search import BUDGETS, Search
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning import fit
from megatron_dlm.planning.cost import step_cost
from megatron_dlm.planning.hardware import HARDWARE, hardware_named
from megatron_dlm.planning.layout import Layout, Workload, lengths

SMALL = Workload(prompts=8, samples=8, updates=2, responses=lengths(300, 1000, count=8))


def test_the_best_is_the_best() -> None:
    """Over all layouts of the search, written out; each costed as a whole."""
    model, hardware = resolve(ModelConfig(model_preset="sdar-4b"), None), HARDWARE["h200"]
    best = Search(model, hardware).best(4, SMALL)
    least = float("inf")
    sizes = (1, 2, 4)
    for tp, pp, cp, engine, again, budget in itertools.product(
        sizes, sizes, sizes, sizes, ("none", "full"), BUDGETS[:2]
    ):
        if tp * pp * cp > 4:
            continue
        layout = Layout(
            world=4, tp=tp, pp=pp, cp=cp, vpp=3 if pp > 1 else 1, rollout_tp=engine, recompute=again,
            sequence_parallel=tp > 1,
        )  # fmt: skip
        work = dataclasses.replace(SMALL, row_budget=budget)
        if fit.fits(model, layout, work, hardware):
            room = fit.cache_room(model, layout, work, hardware)
            least = min(least, step_cost(model, layout, work, hardware, room).seconds)
    assert best.cost.seconds == pytest.approx(least, rel=1e-6)
    again = step_cost(
        model, best.layout, best.workload, hardware, fit.cache_room(model, best.layout, best.workload, hardware)
    )
    assert best.cost.seconds == pytest.approx(again.seconds, rel=1e-6)


def test_what_fits_nowhere_is_said() -> None:
    model = resolve(ModelConfig(model_preset="sdar-8b"), None)
    points = scaling.curve(Search(model, HARDWARE["a100-40"]), (1,), 2048, weak=False)
    assert points == {1: None}
    assert scaling.SHORT_OF_MEMORY in scaling.table(points, weak=False)
    assert scaling.overview({("sdar-8b", 2048): points}).count("| -") >= 1


def test_a_small_study(tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    names = ("strong scaling", "weak scaling", "one model", "one model, long responses", "one model, weak")
    names += ("where the time goes", "choices")
    page.write_text("# Kept\n" + "".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in names))
    arguments = ["--models", "sdar-1.7b", "--lengths", "512", "--worlds", "8", "16", "--write", str(page)]
    assert scaling.main([*arguments, "--json", str(tmp_path / "points.json")]) == 0
    text = page.read_text()
    assert text.startswith("# Kept\n") and "\nold\n" not in text
    assert text.count("sdar-1.7b") >= 3 and "engines' time" in text
    assert capsys.readouterr().out.count("| ---") >= 7
    import json

    points = json.loads((tmp_path / "points.json").read_text())
    assert len(points) == 4 and all(point["seconds"] > 0 for point in points)
    for point in points:
        assert point["seconds"] == pytest.approx(sum(sum(parts.values()) for parts in point["phases"].values()))


def test_pages_without_places_are_refused() -> None:
    with pytest.raises(ValueError, match="has no <!-- choices -->"):
        scaling.between_markers("text", "choices", "body")
    assert scaling.between_markers("a<!-- x -->b<!-- end of x -->c", "x", "new") == (
        "a<!-- x -->\n\nnew\n\n<!-- end of x -->c"
    )


def test_unknown_hardware(capsys) -> None:
    assert scaling.main(["--hardware", "h9000"]) == 2
    assert "h9000 is not known" in capsys.readouterr().err


def test_a_measured_device_can_be_read_back(tmp_path) -> None:
    where = torch.device("cpu")
    measured = calibrate.measure(where, seconds=0.01)
    path = tmp_path / "ours.yaml"
    path.write_text(calibrate.as_yaml(measured, where))
    read = hardware_named(str(path))
    for field in dataclasses.fields(read):
        value, was = getattr(read, field.name), getattr(measured, field.name)
        if field.name in ("bf16_flops", "memory_bandwidth", "matmul_fraction", "layer_seconds"):
            assert value == pytest.approx(was, rel=1e-3)
    assert read.name == measured.name and 0 < read.matmul_fraction <= 1


def test_products_in_fp8_are_measured_and_read_back(tmp_path) -> None:
    """With what a CPU computes in their place."""
    where, path = torch.device("cpu"), tmp_path / "ours.yaml"
    found = calibrate.fp8_products(where, 64, (64, 32, 96), 0.01)
    ours = dataclasses.replace(HARDWARE["h200"], **found | dict(fp8_transposed=False))
    path.write_text(calibrate.as_yaml(ours, where))
    read = hardware_named(str(path))
    assert read.fp8_rate() == pytest.approx(found["fp8_flops"] * found["fp8_fraction"], rel=1e-3)
    assert not read.fp8_transposed and found["fp8_transposed"] is True


def test_the_document_has_a_place_for_every_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
    for name in ("strong scaling", "weak scaling", "one model", "where the time goes", "choices"):
        body = page.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        assert body.count("|") > 20
