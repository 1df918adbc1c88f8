"""Kernels that do not work are not used, and somebody says why. That ranks choose alike: test_exchange.py."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm.config.errors import DependencyError
from megatron_dlm.parallel import self_test

ONES = torch.ones(3)
FLAG = "--loss-head"


def refuse():
    raise RuntimeError("\nptxas: no kernel image.\nmore")


BROKEN = {
    "raises": (refuse, "a small pass ended with RuntimeError, ptxas: no kernel image"),
    "wrong": (
        lambda: [("its output", ONES, ONES), ("its gradient", 1.5 * ONES, ONES)],
        "its gradient differs by 5.0e-",
    ),
    "no number": (lambda: [("its output", ONES * float("nan"), ONES)], "its output differs by inf"),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch) -> None:
    monkeypatch.setattr(self_test, "_found", {})
    monkeypatch.setattr(self_test, "_told", set())


def test_what_works_is_tried_once_for_each_dtype_and_size(capsys) -> None:
    tried = []
    for dtype, size in ((torch.float32, 1), (torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 2)):
        work = lambda: tried.append(1) or [("its output", ONES + 1e-5, ONES)]
        assert self_test.passed(FLAG, "auto", "torch", dtype, work, size)
    assert len(tried) == 3 and not capsys.readouterr().out


@pytest.mark.parametrize("how", BROKEN)
def test_auto_does_without_what_is_broken_and_says_why_once(how: str, capsys) -> None:
    work, said = BROKEN[how]
    assert not any(self_test.passed(FLAG, "auto", "torch", torch.float32, work) for _ in range(2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{FLAG} auto is torch here, because its kernels do not work: ") and said in line


@pytest.mark.parametrize("how", BROKEN)
def test_by_name_it_is_refused(how: str, capsys) -> None:
    work, said = BROKEN[how]
    with pytest.raises(DependencyError) as caught:
        self_test.passed(FLAG, "triton", "torch", torch.float32, work)
    message = str(caught.value)
    assert message.startswith(f"{FLAG} triton does not work here: ") and said in message and "\n" not in message
    assert message.endswith(f"Use {FLAG} torch.") and not capsys.readouterr().out
