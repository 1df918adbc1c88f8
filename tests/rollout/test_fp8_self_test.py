"""Rounding and a product of FP8, tried out: who rounds where a kernel does not work, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm.config.errors import DependencyError
from tests.tiny import one_process

one_process()  # megatron-core must not be imported before the platform is ready

from megatron_dlm.model.fp8 import quantise_rows  # noqa: E402
from megatron_dlm.parallel import self_test  # noqa: E402
from megatron_dlm.rollout import fp8_self_test  # noqa: E402


def exact(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_rows(wide)


def half(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    data, scale = quantise_rows(wide)
    return data, scale / 2


def broken(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("ptxas is not here")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(self_test, "needed", lambda: True)
    monkeypatch.setattr(self_test, "_found", {})
    monkeypatch.setattr(self_test, "_told", set())


@pytest.mark.parametrize(("by", "words"), [(exact, None), (half, "scales differs by 5.0e-01"), (broken, "ptxas")])
def test_torch_rounds_where_the_kernel_does_not_work(by, words: str | None, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fp8_self_test, "rounding", lambda: by)
    assert fp8_self_test.working_rounding() is (by if words is None else quantise_rows)
    said = capsys.readouterr().out
    assert (words in said and "--rollout-weights fp8" in said) if words else not said


def test_a_product_that_does_not_work_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(fp8_self_test, "scaled_product", lambda *_: torch.zeros(37, 144))
    with pytest.raises(DependencyError, match="a product in FP8 differs .*Use --rollout-weights trained"):
        fp8_self_test.working_rounding()


def test_the_product_is_that_of_the_dequantised_numbers() -> None:
    [(_, mine, right)] = fp8_self_test.product_pairs(quantise_rows, torch.device("cpu"))
    assert mine.shape == (37, 144) and self_test.relative_difference(mine, right) < 4e-3
