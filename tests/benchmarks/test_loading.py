from __future__ import annotations

import sys

from benchmarks import loading


def test_it_tells_what_a_step_waits_for(capsys, monkeypatch) -> None:
    monkeypatch.setattr(loading, "KINDS", {"here": dict(num_workers=0)})
    words = "loading --step-ms 1 --updates 3 --samples 8 --global-batch-size 4".split()
    monkeypatch.setattr(sys, "argv", words)
    loading.main()
    cells = capsys.readouterr().out.splitlines()[-1].strip("|").split("|")
    name, first, median, mean, worst, rows, size = (cell.strip() for cell in cells)
    assert name == "here" and float(first) >= 0 and 0 < float(median) <= float(worst) and float(mean) <= float(worst)
    assert int(rows) >= 1 and float(size) >= 0
