"""How gpu_check counts what only a GPU runs."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks import fused_layers, gpu_check, kernel_cases, kernels
from megatron_dlm.platform import kernels as here
from tests.harness import pool


def test_each_difference_has_its_limit_and_what_raises_fails(monkeypatch) -> None:
    monkeypatch.setattr(here, "missing", lambda: None)
    monkeypatch.setattr(kernels, "differences", lambda dtype: {"loss head": 0.01, "sampler, draws that differ": 0.01})
    monkeypatch.setattr("benchmarks.attention.differences", lambda dtype: 1 / 0)
    monkeypatch.setattr(kernel_cases.platform, "is_cuda", lambda: True)
    monkeypatch.setattr("megatron_dlm.parallel.groups.destroy", lambda **_: None)  # other tests need them
    monkeypatch.setattr(fused_layers, "differences", lambda: {"te, dense: loss": 0.001, "mxfp8, dense": "no such chip"})
    found = kernel_cases.kernel_cases(torch.bfloat16)
    assert found["Triton: loss head"] == (0.01, 3e-2) and found["Triton: sampler, draws that differ"] == (0.01, 0.02)
    assert found["layers by te, dense: loss"] == (0.001, 0.01) and found["layers by mxfp8, dense"] == "no such chip"
    ((broken, (difference, _)),) = [(name, one) for name, one in found.items() if "ZeroDivisionError" in name]
    assert math.isnan(difference) and broken.startswith("attention of training: ")
    assert not gpu_check.Check(broken, "bf16", "rel", difference, 0.0, 0.0).passed
    wide = kernel_cases.kernel_cases(torch.float64)
    assert [name for name in wide if "ZeroDivisionError" not in name] == [], "no kernel knows float64"


def layers_beside_groups() -> bool:
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel import groups

    make = lambda: groups.initialize(ParallelConfig(), seed=1) and {}
    make()
    with (
        mock.patch.object(kernel_cases, "platform", SimpleNamespace(is_cuda=lambda: True)),
        mock.patch.object(fused_layers, "differences", make),
    ):
        return kernel_cases._layers(torch.bfloat16) == {}


def test_layers_are_compared_in_a_process_that_has_groups() -> None:
    assert pool(1).run(layers_beside_groups) == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_run_here_is_told() -> None:
    assert kernel_cases._kernels(torch.float32) == {"loss head and sampler in Triton": "this host has no GPU"}
    assert kernel_cases._layers(torch.bfloat16) == {} == kernel_cases._weights(torch.float32)
    assert all(0 <= found < allowed / 2 for found, allowed in kernel_cases._weights(torch.bfloat16).values())
