"""Where a zygote puts itself on hosts of other kinds than this one. Only who may make namespaces can try that."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys

import pytest

from megatron_dlm.rewards.sandbox import confine, zygote

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="root alone can make such hosts")


def _say(code: str, *before: str) -> list[str]:
    """Lines that a Python program prints, run by a command, or a skip where this host does not permit that."""
    done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "SKIP" in done.stdout or "not permitted" in done.stderr:
        pytest.skip("this host does not permit it")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@AS_ROOT
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_what_is_mounted_among_the_libraries():
    """As in containers that bring the driver of their device: it comes along, and nothing there can be written."""
    code = """
import os
from megatron_dlm.rewards.sandbox import kernel
from megatron_dlm.rewards.sandbox.runner import Sandbox
names = [entry.name for entry in os.scandir("/usr/lib") if entry.is_dir(follow_symlinks=False)]
names = sorted(name for name in names if "linux-gnu" not in name and not name.startswith("python"))
inner = f"/usr/lib/{names[0]}/a b" if names else ""
try:
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", os.path.dirname(inner), "tmpfs", 0, "mode=777")
    os.mkdir(inner)
    kernel.mount("tmpfs", inner, "tmpfs", 0, "mode=777")
except OSError:
    raise SystemExit(print("SKIP"))
open(inner + "/held", "w").close()
program = f"import os\\nprint(os.listdir({inner!r}))\\nopen({inner + '/new'!r}, 'w')"
with Sandbox("namespaces") as sandbox:
    outcome = sandbox.run(program)
print(outcome.output.decode().strip())
print(outcome.errors.decode().strip())
"""
    listed, written = _say(code, "unshare", "-m")
    assert listed == "['held']"
    assert "Read-only file system" in written


@AS_ROOT
def test_zygotes_have_users_of_their_own_where_there_are_no_user_namespaces():
    code = """
import os
from megatron_dlm.rewards.sandbox import confine, kernel
real = kernel.unshare
def unshare(flags):
    if flags & kernel.NEW_USER:
        raise OSError(1, "no user namespaces")
    real(flags)
kernel.unshare = unshare
for _ in range(2):
    child = os.fork()
    if not child:
        try:
            user = confine.enter("namespaces")
        except OSError:
            os.write(1, b"SKIP")
            os._exit(0)
        os.write(1, f"{user}\\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
"""
    first, second = map(int, _say(code))
    assert first != second and min(first, second) > confine.OWN_IDS + 1


def test_a_folder_that_a_program_has_closed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("x")
    tmp_path.chmod(0)
    zygote._empty(str(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777 and list(tmp_path.iterdir()) == []
