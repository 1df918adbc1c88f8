"""The suite of GPU figures: what it runs and writes with made-up parts."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_figures import CUT_SHORT, PARTS, Sheet
from benchmarks.gpu_report import MARKER, markdown_of

PAGE = f"kept\n<!-- {MARKER} -->\nold\n<!-- end of {MARKER} -->\nkept too\n"
TOY = ["--device", "cpu", "--size", "tiny"]


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def start(name: str, options, out: Path, limit: float) -> str | None:
    """Stands for a part: one is wrong, one crashes after its first figure, the others give 60 for each."""
    sheet = Sheet(out)
    for number, figure in enumerate(PARTS[name].figures):
        if name == "packed" and number:
            return "it crashed"
        sheet.put(figure.key, 0 if figure.key == "failed" else 60, "a | note")
    return None


def test_the_table_of_nothing_has_every_figure_and_how_to_measure_it(page) -> None:
    assert gpu_suite.main(["--parts", "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("kept\n") and text.endswith("kept too\n") and "\nold\n" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    figures = [(part, figure) for part in PARTS.values() for figure in part.figures]
    assert len(lines) == len(figures) + len(PARTS), "a line each, and a head per part"
    for part, figure in figures:
        assert any(figure.text in line and "not measured" in line and f"--parts {part.name}`" in line for line in lines)


def test_the_document_has_a_place_for_every_figure() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text()
    body = document.split(f"<!-- {MARKER} -->")[1].split(f"<!-- end of {MARKER} -->")[0]
    for part in PARTS.values():
        assert f"**{part.text}**" in body
        assert all(f"| {figure.text} " in body for figure in part.figures)


def test_a_part_that_crashes_loses_nothing_but_its_own_figures(tmp_path, page, capsys) -> None:
    file = tmp_path / "gpu.json"
    words = [*TOY, "--parts", "packed", "correctness", "training-8b", "--json", str(file)]
    assert gpu_suite.main([*words, "--write", str(page), "--write-toys"], start) == 1
    result = json.loads(file.read_text())
    assert list(result["parts"]) == ["correctness", "training-8b", "packed"], "in the order of worth"
    assert result["parts"]["packed"]["why"] == "it crashed" and len(result["parts"]["packed"]["figures"]) == 1
    about = result["parts"]["packed"]["about"]
    assert about["versions"]["torch"] == importlib.metadata.version("torch") and about["size"] == "tiny"
    assert about["device"].startswith("CPU") and about["command"].endswith(
        "gpu.json --write " + str(page) + " --write-toys"
    )
    text = page.read_text()
    assert text.count("Toy sizes") == 3, "above each part that was measured"
    assert text.count("it crashed") == 2 and "a / note" in text
    said = capsys.readouterr().out
    assert "packed: it crashed" in said and "(aim: at least 50 %, reached)" in said
    # Another run adds to it, and each part says which run it is of.
    assert gpu_suite.main([*TOY, "--parts", "head", "--keep", "--json", str(file)], start) == 1
    kept = json.loads(file.read_text())
    assert kept["parts"]["packed"] == result["parts"]["packed"] and kept["parts"]["head"]["why"] is None
    text = markdown_of(kept)
    assert text.count("--parts packed correctness training-8b") == 3 and text.count("--parts head --keep") == 1


@pytest.mark.parametrize(
    "other, says",
    [
        (dict(device="1 x H200"), "beside those of 1 x H200, size tiny"),
        (dict(size="h200"), "size h200, which"),
    ],
)
def test_figures_of_another_machine_or_size_are_not_mixed_in(other, says, tmp_path, page, capsys) -> None:
    file = tmp_path / "gpu.json"
    words = [*TOY, "--json", str(file)]
    assert gpu_suite.main([*words, "--parts", "correctness"], start) == 0
    result = json.loads(file.read_text())
    result["parts"]["correctness"]["about"] |= other
    file.write_text(before := json.dumps(result))
    assert gpu_suite.main([*words, "--parts", "head", "--keep"], start) == 2
    assert says in capsys.readouterr().err and file.read_text() == before
    # A page is made of figures that mean something, whatever the size of this run.
    good = result["parts"]["correctness"]["about"]["size"] == "h200"
    assert gpu_suite.main(["--parts", "--json", str(file), "--keep", "--write", str(page)]) == (0 if good else 2)
    assert ("checks that passed" in page.read_text()) is good
    file.write_text('{"parts": {"head": {"figures": {}}}}')
    assert gpu_suite.main([*words, "--parts", "head", "--keep"], start) == 2
    assert "has not written" in capsys.readouterr().err


def test_what_does_not_fit_the_budget_is_told(tmp_path, monkeypatch, capsys) -> None:
    seen, now = {}, [100.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])

    def slow(name: str, options, out: Path, limit: float) -> str | None:
        seen[name] = limit
        now[0] += min(29.5, limit)
        return gpu_suite.OUT_OF_TIME if limit < 29.5 else None

    file = tmp_path / "gpu.json"
    words = [*TOY, "--parts", "correctness", "packed", "--budget", "43", "--json", str(file)]
    assert PARTS["correctness"].share == 240 and PARTS["packed"].share == 100
    assert gpu_suite.main(words, slow) == 1
    assert seen == {"correctness": pytest.approx(43 * 240 / 340), "packed": pytest.approx(13.5)}, "the rest"
    parts = json.loads(file.read_text())["parts"]
    assert parts["correctness"]["why"] is None and not parts["correctness"]["late"]
    assert parts["packed"]["why"] == "cut short after 14 seconds, its share of --budget 43"
    again = f"{{}}: python -m benchmarks.gpu_suite --parts {{}} --device cpu --size tiny --json {file} --keep"
    assert again.format("1 part was left out or cut short", "packed") in capsys.readouterr().out
    assert gpu_suite.main([*words[:-3], "20", *words[-2:]], slow) == 1
    assert again.format("2 parts were left out or cut short", "correctness packed") in capsys.readouterr().out


def test_limits_share_out_the_budget_and_what_a_part_leaves() -> None:
    from benchmarks.gpu_figures import limit_of

    names, left = list(PARTS), 600.0
    for name in names:
        limit = limit_of(name, names, left)
        assert limit == pytest.approx(600 * PARTS[name].share / sum(part.share for part in PARTS.values()))
        left -= limit
    assert left == pytest.approx(0)
    assert limit_of("refit", ["refit"], 50.0) == 50 and limit_of("refit", ["head", "refit"], -1.0) == 0
    # Nothing used by the first: the second has more.
    assert limit_of(names[1], names, 600) > 600 * PARTS[names[1]].share / sum(part.share for part in PARTS.values())
    worth = ["correctness", "training-8b", "attention", "step", "rollout", "head", "refit", "curves"]
    assert [name for name in names if name in worth] == worth


@pytest.mark.parametrize("written", [True, False])
def test_a_program_that_is_ended_leaves_what_it_has_written(written, tmp_path, monkeypatch) -> None:
    from benchmarks import gpu_parts

    def never_ends(command, *_: object, timeout: float, **__: object) -> None:
        assert 0 < timeout <= 0.9 * 20
        if written:
            Path(command[command.index("--json") + 1]).write_text('[{"what": "logits", "passed": true}]')
        raise gpu_parts.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_parts.subprocess, "run", never_ends)
    with pytest.raises(SystemExit) as ended:
        gpu_parts.measure("correctness", "tiny", "cpu", tmp_path / "out.json", 20.0)
    assert ended.value.code == CUT_SHORT
    found = json.loads((tmp_path / "out.json").read_text())
    nothing = {"why": "gpu_check had not written anything when its time had gone"}
    assert found["passed"] == ({"value": 1.0} if written else nothing) and ("why" in found["failed"]) is not written


def test_a_failed_check_is_an_exit_code(tmp_path) -> None:
    wrong = lambda name, options, out, limit: Sheet(out).put("failed", 1)
    assert gpu_suite.main([*TOY, "--parts", "correctness"], start) == 0
    assert gpu_suite.main([*TOY, "--parts", "correctness"], wrong) == 1


@pytest.mark.parametrize(
    "words, says",
    [
        (["--device", "cpu"], "Use --size tiny"),
        ([*TOY, "--write", "PAGE"], "--write-toys"),
        (["--parts", "--write", "nowhere.md"], "--write nowhere.md"),
        ([*TOY, "--json", "no/such/folder.json"], "--json no/such/folder.json"),
        ([*TOY, "--keep"], "--keep"),
        ([*TOY, "--budget", "0"], "--budget 0"),
    ],
)
def test_command_lines_that_cannot_work(words, says, page, capsys) -> None:
    words = [str(page) if word == "PAGE" else word for word in words]
    assert gpu_suite.main(words, start) == 2
    assert says in capsys.readouterr().err and page.read_text() == PAGE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys) -> None:
    assert gpu_suite.main(["--parts", "head"], start) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch) -> None:
    """A program in the place of Python writes a figure, starts another one, and waits."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/bash\nwhile [ "$1" != --out ]; do shift; done\n'
        f'echo \'{{"passed": {{"value": 3.0}}}}\' > "$2"\nsleep 100 & echo $! > {tmp_path}/child\nwait\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(gpu_suite.sys, "executable", str(stand_in))
    options, out = gpu_suite._parser().parse_args(TOY), tmp_path / "figures.json"
    assert gpu_suite.as_process("head", options, out, 0.5) == gpu_suite.OUT_OF_TIME
    assert json.loads(out.read_text()) == {"passed": {"value": 3.0}}
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists():
        if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{child}").exists()
    stand_in.write_text("#!/bin/bash\necho first; echo the reason; exit 4\n")
    assert gpu_suite.as_process("head", options, out, 20) == "the reason (exit code 4)"
    stand_in.write_text(f"#!/bin/bash\nexit {CUT_SHORT}\n")
    assert gpu_suite.as_process("head", options, out, 20) == gpu_suite.OUT_OF_TIME


def test_pairs_and_tiles_are_those_of_the_rule(monkeypatch) -> None:
    import numpy as np

    from benchmarks import gpu_training
    from megatron_dlm.diffusion.layout import Grid, visible
    from megatron_dlm.diffusion.rows import build_row
    from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item

    monkeypatch.setattr(gpu_training, "TILE", 8)
    traces = random_group(6, [13, 9], 4, np.random.default_rng(1))
    items = [(n, trace_item(trace, Grid(4))) for n, trace in enumerate(traces)]
    row = build_row(items, items[0][1].shared_length + sum(item.own_length for _, item in items) + 5, MASK_ID, PAD_ID)
    layout = row.layout
    mask, real = visible(layout, layout), layout.group >= 0
    pairs = [(q, k) for q, k in mask.nonzero().tolist() if real[q]]
    assert gpu_training.areas(layout, tiled=False) == (len(pairs), int(real.sum()) ** 2)
    assert gpu_training.areas(layout, tiled=True) == (len(pairs), 64 * len({(q // 8, k // 8) for q, k in pairs}))


def test_torchrun_has_time_to_end_its_workers(tmp_path) -> None:
    """A part has ended; a program that it has started is there still, and has something to do at its end."""
    program = (
        f"trap 'sleep 0.2; touch {tmp_path}/ended; exit' TERM; touch {tmp_path}/ready; while :; do sleep 0.02; done"
    )
    command = ["bash", "-c", f"({program}) & until [ -e {tmp_path}/ready ]; do sleep 0.01; done; exit 1"]
    part = subprocess.Popen(command, start_new_session=True)
    assert part.wait(20) == 1
    gpu_suite._end(part)
    assert (tmp_path / "ended").exists()
