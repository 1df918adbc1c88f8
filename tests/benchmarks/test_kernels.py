"""benchmarks/kernels.py at small sizes: the kernels agree with torch, and it says why where they cannot run."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels


@pytest.mark.parametrize("dtype", kernels.TOLERANCES)
def test_kernels_agree_with_torch(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    found = kernels.differences(dtype, 300, 16)
    assert len(found) == 8 and found.pop("sampler, draws that differ") == 0
    assert all(0 <= value < kernels.TOLERANCES[dtype] for value in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_a_host_that_cannot_run_them_is_told_so(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.main([]) == 2
    assert "this host has no GPU" in capsys.readouterr().err
