"""When Triton's kernels are used, and that each of them can be compiled for the GPU that it is for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_dlm.config.errors import DependencyError
from megatron_dlm.platform import kernels


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


COMPILE = """
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_dlm.diffusion import filters_triton, sampling_triton
from megatron_dlm.model import fp8_triton, head_triton
from megatron_dlm.rollout import unmask_triton

SIXTY_FOUR = "labels slot position top_k kinds streams steps token remasking tokens_table step_table version_table"
SIXTY_FOUR = f"{SIXTY_FOUR} weights block_size denoising_steps block_steps steps_taken".split()
DOUBLE = "mass more kept moment top_p logprob sampling_logprob confidence threshold entropy_bound logprob_table"
DOUBLE = f"{DOUBLE} sampling_logprob_table".split()
TYPES = dict.fromkeys(SIXTY_FOUR, "*i64") | dict.fromkeys(DOUBLE, "*fp64")
TYPES |= dict(best="*i32", last="*i32", lasts="*i32", greedy="*u8", masked="*u8", known_table="*u8")
WHOLE = "width first size mask_id pieces length".split()


def ptx(kernel, warps, constants, **types):
    kinds = TYPES | dict.fromkeys(WHOLE, "i32") | types
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [n for n, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name == "width"]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, {(n,): [["tt.divisibility", 16]] for n in aligned})
    return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps}).asm["ptx"]


for dtype in ("*bf16", "*fp32"):
    head = dict(BLOCK=8192)
    for code in (
        ptx(head_triton._statistics, 16, head | dict(LOWEST=-8e37, WITH_MOMENT=True), logits=dtype),
        ptx(head_triton._gradient, 16, head | dict(WITH_ENTROPY=True), logits=dtype),
        ptx(sampling_triton._pieces, 8, dict(PIECE=4096), logits=dtype, temperatures="*fp64"),
        ptx(sampling_triton._tokens, 8, dict(PIECE=4096, PIECES=64, FILTERS=True), logits=dtype, temperatures="*fp64"),
        ptx(filters_triton.keep, 8, dict(PIECE=4096, PIECES=64, TILE=2048, WAYS=8), logits=dtype, temperatures="*fp64"),
    ):
        assert re.search(r"ld\\.global\\.\\S*v4", code), "logits are not loaded 16 bytes at a time"
        assert "div.rn.f32" in code and "ld.local" not in code
for block in (4, 64):
    ptx(unmask_triton._unmask, 4, dict(BLOCK=block))
code = ptx(fp8_triton._round, 8, dict(BLOCK=4096), wide="*bf16", data="*fp8e4nv", columns="i32")
assert "cvt.rn.satfinite.e4m3x2.f32" in code and "div.rn.f32" in code and "ld.local" not in code
print("compiled")
"""


def test_every_kernel_compiles_for_a_gpu_without_one() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=240
    )
    assert found.stdout == "compiled\n", found.stderr[-3000:]
