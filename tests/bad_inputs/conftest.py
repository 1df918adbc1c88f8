"""A server that runs commands, and a small valid world that is made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.bad_inputs.bench import make_world
from tests.command_server import Server, command_server


@pytest.fixture(scope="session")
def server() -> Server:
    return command_server()


@pytest.fixture(scope="session")
def pristine(server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")

    def run(argv: list[str], where: Path) -> None:
        result = server.run(argv, where)
        assert result.codes == [0], result.stdout + result.stderr

    make_world(folder, run)
    return folder


@pytest.fixture
def world(pristine, tmp_path) -> Path:
    """A copy of the world, to be spoiled."""
    shutil.copytree(pristine, tmp_path / "world")
    return tmp_path / "world"
