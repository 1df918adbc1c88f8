"""What is said of a machine that lacks Transformer Engine, or a GPU for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.parallel import PrecisionConfig
from megatron_dlm.platform import is_cuda, te

TE = dict(transformer_impl="transformer_engine")
FP8 = dict(**TE, fp8_format="hybrid")
HOPPER, BLACKWELL, AMPERE = (9, 0), (10, 0), (8, 0)


def told(*given) -> str | None:
    try:
        te.check(*given)
    except DependencyError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("wanted", "chip", "cuda", "version"),
    [
        (TE, AMPERE, "12.1", "2.0"),
        (FP8, HOPPER, "12.4", "2.2.0"),
        (FP8 | dict(fp8_recipe="delayed", fp8_param_gather=True), HOPPER, "12.4", "2.6.0.dev0+abc"),
        (FP8 | dict(fp8_recipe="blockwise"), HOPPER, "13.0", "2.12.1"),
        (FP8 | dict(fp8_recipe="mxfp8"), BLACKWELL, "13.0", "2.1"),
    ],
)
def test_machines_that_can(wanted: dict, chip: tuple[int, int], cuda: str, version: str) -> None:
    assert told(PrecisionConfig(**wanted), chip, cuda, version) is None


@pytest.mark.parametrize(
    ("wanted", "chip", "cuda", "version", "words"),
    [
        (TE, HOPPER, "13.0", "1.14.0", ["Transformer Engine 2.0", "1.14.0"]),
        (FP8, AMPERE, "13.0", "2.8", ["--fp8-recipe tensorwise", "8.9", "8.0", "no --fp8-format"]),
        (FP8, HOPPER, "13.0", "2.1.0", ["--fp8-recipe tensorwise", "2.2"]),
        (FP8 | dict(fp8_recipe="blockwise"), HOPPER, "12.8", "2.8", ["CUDA 12.9", "12.8"]),
        (FP8 | dict(fp8_recipe="blockwise"), HOPPER, "12.9", "2.2", ["2.3"]),
        (FP8 | dict(fp8_recipe="mxfp8"), HOPPER, "13.0", "2.8", ["10.0", "9.0", "another recipe"]),
        (FP8 | dict(fp8_recipe="mxfp8"), (12, 0), "13.0", "2.8", ["less than 12.0"]),
        (FP8 | dict(fp8_recipe="delayed", fp8_param_gather=True), HOPPER, "13.0", "2.1", ["--fp8-param-gather", "2.2"]),
    ],
)
def test_machines_that_cannot(wanted: dict, chip, cuda: str, version: str, words: list[str]) -> None:
    message = told(PrecisionConfig(**wanted), chip, cuda, version)
    assert message is not None and all(word in message for word in words), message


@pytest.mark.skipif(is_cuda(), reason="of a host without a GPU")
def test_plain_layers_ask_nothing_and_others_a_gpu() -> None:
    te.require(PrecisionConfig())
    with pytest.raises(DependencyError, match="needs a GPU"):
        te.require(PrecisionConfig(**TE))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not installed"),
        ("raise ImportError('libcudart is not here.')", "cannot be imported (ImportError: libcudart is not here). "),
        ("import os; os.abort()", "cannot be imported (exit code -6). "),
    ],
)
def test_an_installation_that_does_not_load_ends_a_process_of_its_own(
    content: str | None, words: str, tmp_path: Path, monkeypatch
) -> None:
    if content is not None:
        (tmp_path / "transformer_engine").mkdir()
        (tmp_path / "transformer_engine" / "__init__.py").write_text(content)
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda name: content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    te.installed.cache_clear()
    with pytest.raises(DependencyError) as caught:
        te.installed()
    te.installed.cache_clear()
    assert words in str(caught.value) and "--transformer-impl local" in str(caught.value)


def test_the_version_of_one_that_loads(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("print('a notice'); __version__ = '2.7.0'")
    (package / "pytorch.py").touch()
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    te.installed.cache_clear()
    assert te.installed() == "2.7.0"
    te.installed.cache_clear()


def test_the_real_package_has_what_the_stand_in_says_of_it() -> None:
    try:
        te.installed()
    except DependencyError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", "import megatron_dlm.model.te"], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
