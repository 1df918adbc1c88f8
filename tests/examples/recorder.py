"""A stand-in for Python that writes down how it was started: the examples, and all that they decide, without a job.

recorder = Recorder(folder)
result = recorder.start("tracerl_8b.sh", "--seed", "1", TP="4")
recorder.calls[0].flags["--seed"]
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh") if path.name not in ("launch.sh", "quickstart.sh"))

_STAND_IN = """#!/bin/bash
here=$(dirname "$0")
count=$(ls "$here" | grep -c argv || true)
printf '%s\\0' "$@" > "$here/argv.$count"
env -0 > "$here/env.$count"
eval "${{THEN:-}}"
"""
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_A_LAUNCHER += ("NNODES", "NODE_RANK", "NPROC_PER_NODE")


def environment(**more: str) -> dict[str, str]:
    """Of a shell that nobody's launcher and no earlier test has set anything in."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_LAUNCHER and not name.startswith(("SLURM_", "TORCHELASTIC_", "PET_"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | more


def finish(words: list, folder: Path, env: dict[str, str], limit: float = 600) -> subprocess.CompletedProcess:
    """Run a launcher to its end. One that has to be ended is asked first, so that it ends its own processes."""
    process = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=limit)
    except BaseException:
        process.terminate()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@dataclass(frozen=True)
class Call:
    """One start of the stand-in. Attributes: argv: behind the program's name. env."""

    argv: list[str]
    env: dict[str, str]

    @property
    def command(self) -> list[str]:
        """What megatron_dlm gets."""
        return self.argv[self.argv.index("megatron_dlm") + 1 :]

    @property
    def flags(self) -> dict[str, str]:
        """--flag -> the word behind it; of a flag given twice the last, as in `megatron_dlm`."""
        words = self.command
        return {word: after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--")}


@dataclass
class Recorder:
    """Attributes: folder: an empty one; work: where the examples are started."""

    folder: Path
    work: Path = field(init=False)
    python: Path = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.folder / "a place"
        self.work.mkdir()
        (self.folder / "bin of mine").mkdir()
        self.python = self.folder / "bin of mine" / "python"
        self.python.write_text(_STAND_IN.format())
        self.python.chmod(0o755)
        (self.work / "runs" / "tiny" / "data").mkdir(parents=True)  # as if the tiny files had been made

    @property
    def calls(self) -> list[Call]:
        found = []
        for number in range(len(list(self.python.parent.glob("argv.*")))):
            argv, env = (
                (self.python.parent / f"{kind}.{number}").read_bytes().decode().split("\0")[:-1]
                for kind in ("argv", "env")
            )
            found.append(Call(argv, dict(entry.split("=", 1) for entry in env)))
        return found

    def popen(self, script: str | Path, *flags: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(EXAMPLES / script), *flags],  # a path of its own stays as it is
            cwd=self.work,
            env=environment(PYTHON=str(self.python)) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )

    def start(self, script: str | Path, *flags: str, expect: int = 0, **more: str) -> str:
        """Start an example and wait for its end. Returns what it said on standard error."""
        process = self.popen(script, *flags, **more)
        _, said = process.communicate(timeout=60)
        assert process.returncode == expect, said
        return said
