"""Hostile programs: none passes, none outlives its limit, none harms the next."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from megatron_dlm.rewards.sandbox.runner import Check
from megatron_dlm.rewards.sandbox.watch import below
from tests.rewards.sandbox.hostile import FUNCTIONS, PROGRAMS

TEST = Check("assert f(3) == 9")


def _only_zygotes_are_left(sandbox):
    """A zygote is a process, or two where it had to enter namespaces; nothing below it may live."""
    for zygote in sandbox._zygotes.values():
        most = {"namespaces": 2, "bubblewrap": 3}.get(sandbox.level, 1)
        if zygote.process.poll() is None:
            assert len(below(zygote.process.pid)) <= most


def test_there_are_enough_of_them():
    assert len(FUNCTIONS) + len(PROGRAMS) >= 25


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(sandbox, name):
    program, words = FUNCTIONS[name]
    word = sandbox.check(program, TEST)
    _only_zygotes_are_left(sandbox)
    assert word in words
    assert sandbox.check("def f(x): return x * x", TEST) == "pass"  # and the next is judged as ever


@pytest.fixture
def secret():
    """A file that anybody on this host may read and write, in a folder to which anybody may add: only the sandbox keeps
    a program out."""
    with tempfile.TemporaryDirectory(prefix="secret-") as folder:
        path = Path(folder) / "secret"
        path.write_text("42")
        path.chmod(0o666)
        path.parent.chmod(0o777)
        yield path


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(sandbox, level, secret, name):
    if level == "landlock" and name in ("leaves children", "leaves a daemon", "CPU of children", "memory of children"):
        pytest.skip("with landlock a program is one process")
    program, words = PROGRAMS[name]
    outcome = sandbox.run(f"HERE, PARENT = {str(secret)!r}, {os.getpid()}\n{program}")
    _only_zygotes_are_left(sandbox)
    assert outcome.word in words, outcome
    assert b"42" not in outcome.output.split()
    assert os.listdir(secret.parent) == ["secret"] and secret.read_text() == "42"
    following = sandbox.run("print(input())", "next")
    assert (following.word, following.output) == ("pass", b"next\n")


def test_what_a_program_leaves_is_gone_for_the_next(sandbox, level):
    if level == "landlock":
        pytest.skip("with landlock nothing can be written")
    leave = "import os\nos.makedirs('a/b/c')\nopen('a/b/c/f', 'w').write('x')\nos.chmod('a/b', 0)\nos.symlink('/', 'l')"
    assert sandbox.run(leave).word == "pass"
    assert sandbox.run("import os\nprint(os.listdir('/tmp'))").output == b"[]\n"


def test_a_program_that_closes_its_folder(sandbox, level):
    if level == "landlock":
        pytest.skip("with landlock nothing can be written")
    close = "import os, contextlib\nopen('f', 'w').close()\nwith contextlib.suppress(OSError): os.chmod('/tmp', 0)"
    for _ in range(2):
        assert sandbox.run(close).word == "pass"
        zygote = sandbox._zygotes["programs"].process.pid
    assert sandbox.run("import os\nprint(os.listdir('/tmp'))").output == b"[]\n"
    assert sandbox._zygotes["programs"].process.pid == zygote  # it did not have to be replaced


def test_a_path_too_long_to_remove(sandbox, level):
    if level == "landlock":
        pytest.skip("with landlock nothing can be written")
    sandbox.run("import os\nfor _ in range(3000):\n os.mkdir('d' * 50)\n os.chdir('d' * 50)")
    assert sandbox.run("import os\nprint(os.listdir('/tmp'))").output == b"[]\n"


def test_a_killed_zygote_is_replaced(sandbox):
    sandbox._zygote("programs").process.kill()
    sandbox._zygotes["programs"].process.wait()
    assert sandbox.run("print(1)").output == b"1\n"
