"""Layers of the Transformer Engine that is installed, on a GPU of the mind (tests/pretend_gpu).

Its kernels are plain torch there; its layers, its tensors in FP8 and its optimizer are the package's own. What a
stand-in (tests/stand_in) takes for granted of them is tested here, where the package can be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests.pretend_gpu.run import ROOT

# This process may hide it: it has no GPU.
pytestmark = pytest.mark.skipif(
    PathFinder.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


def on_the_gpu(*words: object) -> None:
    """A program on it, of which nothing is a GPU's to say."""
    command = [sys.executable, "-m", "tests.pretend_gpu.run", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_layers_learn_as_the_plain_ones(tmp_path: Path) -> None:
    """In bfloat16, and in FP8 with each recipe of this GPU."""
    ways = ["te", "tensorwise", "delayed", "blockwise"]
    on_the_gpu("benchmarks.fused_layers", "--ways", *ways, "--json", tmp_path / "found.json")
    compared = json.loads((tmp_path / "found.json").read_text())
    assert len(compared) == 2 * 2 * (1 + len(ways)) and all(isinstance(one, float) for one in compared.values())
    for what, difference in compared.items():
        assert difference < (0.15 if "gradients" in what else 5e-3), what


@pytest.mark.parametrize("case", ["there_and_back", "resumed", "kept", "kept_experts"])
def test_checkpoints_and_refits(case: str, tmp_path: Path) -> None:
    on_the_gpu("tests.commands.transformer_engine_cases", case, tmp_path)


@pytest.mark.parametrize("case", ["delayed", "delayed_kept"])
def test_a_run_goes_on_with_the_scales_that_it_had(case: str, tmp_path: Path) -> None:
    for _ in range(2):
        on_the_gpu("tests.commands.transformer_engine_cases", case, tmp_path)
