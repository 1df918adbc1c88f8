"""benchmarks/loss_head.py at small sizes: all ways agree, and it notices when one does not."""

from __future__ import annotations

import pytest

from benchmarks import loss_head

SMALL = ["--targets", "40", "--vocab-size", "300", "--hidden-size", "16", "--chunk-sizes", "0", "8", "64"]


@pytest.mark.parametrize("more", [[], ["--with-entropy"]])
def test_chunks_agree_with_the_table(more: list[str], capsys) -> None:
    assert loss_head.main([*SMALL, "--dtypes", "bf16", "fp32", *more]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 6 and sum("table" in line.split("s  memory")[0] for line in lines) == 2
    assert sum("time x" in line for line in lines) == 4


def test_a_way_that_differs_is_noticed(monkeypatch, capsys) -> None:
    right = loss_head.label_policy

    def wrong(hidden, *rest):
        return right(hidden * 1.01, *rest)

    monkeypatch.setattr(loss_head, "label_policy", wrong)
    assert loss_head.main([*SMALL, "--dtypes", "fp32"]) == 1
    assert "differ" in capsys.readouterr().err


def test_a_table_beyond_the_memory_is_left_out(capsys) -> None:
    assert loss_head.main([*SMALL, "--memory-gb", "0.00001"]) == 0
    assert "left out" in capsys.readouterr().out
