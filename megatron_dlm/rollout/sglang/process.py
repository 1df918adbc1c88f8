"""The child: SGLang's interpreter, started with what it needs to find, and ended with all that it started.

A private folder holds the child's view of things:
    path/megatron_dlm              link to this package: the trainer's own packages must not come along
    path/megatron_dlm-*.dist-info  so that SGLang finds the plugin, whether or not that interpreter has this package
    model/config.json              the model, without weights
    algorithm.yaml                 the algorithm's settings
    log                            what the child printed

The child leads a process group of its own. It ends when the socket pair closes, and the group is killed at exit; so it
outlives neither a crash nor a kill of the trainer.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron_dlm
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.rollout.sglang.protocol import Closed, Link, Message

_ENTRY_POINTS = "[sglang.srt.plugins]\nmegatron_dlm = megatron_dlm.rollout.sglang.plugin:register\n"
_OURS = ("PYTHON", "TORCHELASTIC_", "GROUP_", "ROLE_")
_OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VIRTUAL_ENV")
_LAST_LINES = 30


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What a child is started with.

    Attributes:
        config: config.json of the model.
        mask_id, vocabulary_size: of the policy.
        block_size, max_running_requests, context_length, dtype, mem_fraction_static: of SGLang's engine.
        devices: value of CUDA_VISIBLE_DEVICES; None on a host without CUDA.
        tensor_parallel_size: workers.
    """

    config: dict[str, Any]
    mask_id: int
    vocabulary_size: int
    block_size: int
    max_running_requests: int
    context_length: int
    dtype: str
    mem_fraction_static: float
    devices: str | None
    tensor_parallel_size: int

    def to_wire(self, folder: Path) -> Message:
        rest = {name: value for name, value in asdict(self).items() if name not in ("config", "devices")}
        places = {"model_folder": str(folder / "model"), "algorithm_file": str(folder / "algorithm.yaml")}
        return rest | places | {"cuda": self.devices is not None}


class Child:
    """A running child.

    Args:
        command: the interpreter, and how it is told to run the server; the descriptor of its socket and its folder are
            appended.
        inherited: further descriptors that it keeps.

    Raises:
        DependencyError: it did not start.
    """

    def __init__(self, command: Sequence[str], settings: ChildSettings, inherited: Sequence[int] = ()) -> None:
        self.folder = _private_folder(settings)
        ours, theirs = socket.socketpair()
        self.link = Link(ours)
        try:
            with theirs, open(self.folder / "log", "wb") as log:
                self.process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(self.folder)],
                    env=_environment(self.folder, settings),
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(), *inherited),
                    start_new_session=True,
                )
        except OSError as error:
            self.link.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise DependencyError(
                f"SGLang did not start, because {command[0]} cannot be run on {socket.gethostname()} "
                f"({error.strerror}). Give --sglang-python a program that is there on every host."
            ) from None
        atexit.register(self.close)
        try:
            self.link.send(settings.to_wire(self.folder))
            self.about = self._checked(self.link.receive())
        except (Closed, RuntimeError) as error:
            print(self.last_lines(), file=sys.stderr, flush=True)
            self.close()
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise DependencyError(
                f"SGLang did not start in {command[0]} ({reason}). What it printed last stands above: see that its "
                "environment is whole and its device has room, or use --rollout-backend native."
            ) from None

    def ask(self, command: str, **content: Any) -> Message:
        """Give a command and wait for its answer.

        Raises:
            RuntimeError: it failed, or the child is gone.
        """
        self.tell(command, **content)
        return self._checked(self.hear())

    def tell(self, command: str, **content: Any) -> None:
        try:
            self.link.send({"command": command} | content)
        except Closed:
            raise self._gone() from None

    def hear(self) -> Message:
        """The next message. Raises RuntimeError when the child is gone."""
        try:
            return self.link.receive()
        except Closed:
            raise self._gone() from None

    def last_lines(self) -> str:
        """The end of what it printed."""
        with contextlib.suppress(OSError):
            text = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
            return "\n".join(text.splitlines()[-_LAST_LINES:])
        return ""

    def close(self) -> None:
        """End it, and all that it started. May be called again."""
        atexit.unregister(self.close)
        self.link.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _checked(answer: Message) -> Message:
        if "error" in answer:
            raise RuntimeError(str(answer["error"]))
        return answer

    def _gone(self) -> RuntimeError:
        return RuntimeError(f"the SGLang process has ended; its last words:\n{self.last_lines()}")


def server_command(python: str) -> list[str]:
    """`python`: as the user gave it. The child starts in a folder of its own; links are not followed, because an
    environment's python is one."""
    return [os.path.abspath(python), "-m", "megatron_dlm.rollout.sglang.server"]


def _private_folder(settings: ChildSettings) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="megatron-dlm-sglang-"))
    link_package(folder / "path")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(settings.config, indent=2), encoding="utf-8")
    algorithm = {name: getattr(settings, name) for name in ("block_size", "mask_id", "vocabulary_size")}
    (folder / "algorithm.yaml").write_text(json.dumps(algorithm), encoding="utf-8")  # JSON is YAML
    return folder


def link_package(path: Path) -> None:
    """Make a folder that, on an interpreter's path, gives it this package and the plugin, and nothing else."""
    about = path / f"megatron_dlm-{megatron_dlm.__version__}.dist-info"
    about.mkdir(parents=True)
    (path / "megatron_dlm").symlink_to(Path(megatron_dlm.__file__).resolve().parent, target_is_directory=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: megatron-dlm\nVersion: {megatron_dlm.__version__}\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text(_ENTRY_POINTS, encoding="utf-8")


def _environment(folder: Path, settings: ChildSettings) -> dict[str, str]:
    """The trainer's, without what speaks of its interpreter and its job."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(_OURS) and name not in _OF_LAUNCHER
    }
    kept["PYTHONPATH"] = str(folder / "path")
    kept["PYTHONUNBUFFERED"] = "1"
    if settings.devices is None:
        kept["SGLANG_USE_CPU_ENGINE"] = "1"
    else:
        kept["CUDA_VISIBLE_DEVICES"] = settings.devices
    return kept
