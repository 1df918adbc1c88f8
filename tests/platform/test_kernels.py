"""When Triton's kernels are used, and that each of them can be compiled for the GPU that it is for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dlm.config.errors import DependencyError
from megatron_dlm.platform import kernels

ROOT = Path(__file__).resolve().parents[2]


def test_torch_needs_nothing(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: pytest.fail("nobody asked for triton"))
    assert not kernels.by_triton("--loss-head", "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_a_cpu_has_them_only_by_name_and_interpreted(monkeypatch) -> None:
    assert not kernels.by_triton("--loss-head", "auto")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DependencyError, match="--loss-head triton cannot run here, because this host has no GPU"):
        kernels.by_triton("--loss-head", "triton")


def test_a_gpu_has_them_if_triton_is_there_and_new_enough(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "device", lambda: torch.device("cuda", 0))

    class Installed:
        __version__ = "3.6.0+cu130"

    monkeypatch.setitem(sys.modules, "triton", Installed)
    assert kernels.by_triton("--loss-head", "auto") and kernels.by_triton("--loss-head", "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.by_triton("--loss-head", "auto") and "7.5" in kernels.missing()
    monkeypatch.setattr(Installed, "__version__", "2.3.1")
    assert not kernels.by_triton("--loss-head", "auto") and "2.3.1" in kernels.missing()
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert not kernels.by_triton("--loss-head", "auto") and "triton" in kernels.missing()


def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    sizes = ["--widths", "151936", "18992", "--sizes", "4096", "--blocks", "4", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", *sizes, "--json", tmp_path / "found.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    over_logits = {"_statistics", "_gradient", "_pieces", "_tokens", "keep"}
    assert {one["name"] for one in found} == over_logits | {"_round", "_unmask"}
    for one in found:
        code = one["ptx"]
        assert one["stack"] <= 32 * (one["name"] in over_logits), one["name"]
        if one["name"] in over_logits:
            assert re.search(r"ld\.global\.\S*v4", code), "logits are not loaded 16 bytes at a time"
            assert "div.rn.f32" in code and "ld.local" not in code  # as torch divides
        if one["name"] == "_round" and one["case"].endswith("bfloat16"):
            assert "cvt.rn.satfinite.e4m3x2.f32" in code and "div.rn.f32" in code
