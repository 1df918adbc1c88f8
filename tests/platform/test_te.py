"""What is said of a machine that lacks Transformer Engine, or a GPU for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest

from megatron_dlm import platform
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.parallel import ParallelConfig, PrecisionConfig
from megatron_dlm.platform import install, is_cuda, te

install()

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


BROKEN = {  # what the package does when it is imported -> what is said of it
    "raise ImportError('libcudart is not here.')": "ImportError: libcudart is not here",
    "raise OSError('undefined symbol: nvte')": "OSError: undefined symbol: nvte",
    "import os; os.abort()": "exit code -6",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Iterator[Callable[[str], None]]:
    """Installs a Transformer Engine of this content. Nothing of it is left afterwards."""
    import megatron_dlm.training.setup  # noqa: F401 (with it megatron-core, which must not meet this one)

    monkeypatch.setattr(platform, "is_cuda", lambda: True)

    def install(content: str) -> None:
        folder = tmp_path / "transformer_engine"
        folder.mkdir()
        (folder / "__init__.py").write_text(content)
        (folder / "pytorch.py").touch()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(te._TOLD, "")
    te._probe.cache_clear()
    real = taken_out()
    yield install
    te._probe.cache_clear()
    taken_out()
    sys.modules.update(real)


def taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]
    return {name: sys.modules.pop(name) for name in names}


def test_none_is_installed(package, monkeypatch) -> None:
    monkeypatch.setattr(te.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="is not installed") as caught:
        te.installed()
    assert "--transformer-impl local" in str(caught.value)
    te.shield()
    assert "transformer_engine" not in sys.modules and te.hidden() is None and te.found() == (None, "none")


def described() -> str:
    """What the line about the model says of plain layers."""
    from megatron_dlm.training.setup import Session

    return Session(None, ParallelConfig(), None, None, None)._layers()


@pytest.mark.parametrize("content", BROKEN)
def test_an_installation_that_does_not_load_ends_a_process_of_its_own_and_is_hidden(content: str, package) -> None:
    package(content)
    te.shield()
    with pytest.raises(ImportError):  # which is all that megatron-core expects
        import transformer_engine.pytorch.optimizers  # noqa: F401
    assert te.hidden() == BROKEN[content]
    assert te.found() == (None, f"one that cannot be imported ({BROKEN[content]})")
    assert f"plain layers (Transformer Engine cannot be imported: {BROKEN[content]})" in described()
    with pytest.raises(DependencyError) as caught:
        te.installed()
    assert f"cannot be imported ({BROKEN[content]}). " in str(caught.value)
    assert "--transformer-impl local" in str(caught.value)


def test_one_that_loads_is_left_alone(package) -> None:
    package("print('a notice'); __version__ = '2.7.0'")
    te.shield()
    import transformer_engine.pytorch

    assert transformer_engine.__version__ == te.installed() == "2.7.0" and te.hidden() is None
    assert te.found() == ("2.7.0", "2.7.0")


def test_without_a_gpu_it_is_hidden_and_not_tried(package, monkeypatch) -> None:
    """megatron-core would give its kernels tensors of the CPU."""
    monkeypatch.setattr(platform, "is_cuda", lambda: False)
    package("raise AssertionError")
    te.shield()
    with pytest.raises(ModuleNotFoundError):
        import transformer_engine.pytorch.optimizers  # noqa: F401
    assert not te._probe.cache_info().currsize and described() == "plain layers"


def test_a_run_starts_beside_one_that_does_not_load(package, tmp_path: Path) -> None:
    """megatron-core imports it wherever it is found; this run gets far enough to miss its tokenizer. It is started by a
    process that knows already, and need not try again.
    """
    tries = tmp_path / "tries"
    package(f"import os; open({str(tries)!r}, 'a').write('x'); os._exit(77)")
    assert "exit code 77" in te.found()[1]
    command = "sft --data-path no.jsonl --train-iters 1 --global-batch-size 1 --tokenizer-model no"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_dlm", *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "tokenizer" in done.stderr and "Traceback" not in done.stderr
    assert tries.read_text() == "x"
    te._probe.cache_clear()
    os.environ[te._TOLD] = os.environ[te._TOLD].replace(str(tmp_path), "another")  # what was said of another one
    assert "exit code 77" in te.found()[1] and tries.read_text() == "xx"


def test_preprocess_which_prepares_no_device_hides_it_too(tmp_path: Path, monkeypatch) -> None:
    from megatron_dlm.commands import preprocess

    def shield() -> None:
        raise InterruptedError

    monkeypatch.setattr(te, "shield", shield)
    monkeypatch.setitem(sys.modules, "megatron_dlm.data.preprocess", None)  # it imports megatron-core
    (tmp_path / "lines.jsonl").write_text("{}")
    given = f"--input {tmp_path}/lines.jsonl --output {tmp_path}/out --tokenizer-model {tmp_path} --workers 1"
    with pytest.raises(InterruptedError):
        preprocess.main(given.split())


def test_the_real_package_has_what_the_stand_in_says_of_it() -> None:
    if PathFinder.find_spec("transformer_engine") is None:  # the one that this process may hide
        pytest.skip("Transformer Engine is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "import megatron_dlm.model.te"], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
