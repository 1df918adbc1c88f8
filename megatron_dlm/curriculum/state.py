"""What a run of a curriculum remembers: one small file, which appears whole or not at all.

    SAVE/curriculum.json     finished visits with their metrics, and the one that is at work
    SAVE/NAME/               folder of a stage; NAME@2 in its second round
    SAVE/discarded/          what --redo-from has set aside

Rank 0 alone writes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dlm.config.errors import CheckpointError, ConfigError
from megatron_dlm.curriculum.progress import Done, folder_of

FILE = "curriculum.json"
DISCARDED = "discarded"
LATEST = "latest_checkpointed_iteration.txt"  # as checkpoint/places.py writes it
_VERSION = 1
_DAMAGED = (
    "is no record of a curriculum (it was changed by hand, or another program wrote it). Remove it to start anew."
)


@dataclass(slots=True)
class State:
    """Attributes: done: finished visits, in order. running: name of the folder that is at work, if one is. outputs:
    files outside the run's folder that its stages have written, or begun to write."""

    done: list[Done] = field(default_factory=list)
    running: str | None = None
    outputs: list[str] = field(default_factory=list)


def read_state(save: str | Path) -> State:
    """Of a run's folder; an empty one where nothing has begun.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(save) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return State()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None)
        raise CheckpointError(f"{path} {f'cannot be read ({reason}). Check it.' if reason else _DAMAGED}") from None
    try:
        if content["version"] != _VERSION:
            raise ValueError(content["version"])
        return State([Done(**visit) for visit in content["done"]], content["running"], content["outputs"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} {_DAMAGED}") from None


def write_state(save: str | Path, state: State) -> None:
    """Replace the file, durably.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    path = Path(save) / FILE
    unfinished = path.with_name(f".{FILE}.new")
    content = {
        "version": _VERSION,
        "running": state.running,
        "outputs": state.outputs,
        "done": [dataclasses.asdict(visit) for visit in state.done],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise _cannot_write(save, error) from None


@contextmanager
def alone(save: str | Path) -> Iterator[None]:
    """Hold the run's folder against a second run of the same host; whoever is killed holds it no more.

    Raises:
        ConfigError: another one is at work in it, or it cannot be written to.
    """
    try:
        Path(save).mkdir(parents=True, exist_ok=True)
        file = open(Path(save) / ".lock", "a")
    except OSError as error:
        raise _cannot_write(save, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another run of a curriculum is at work in {save}. Stop it, or give save another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def saved_step(folder: str | Path) -> int | None:
    """The newest step of a stage that a checkpoint was finished of; None: there is none."""
    try:
        return int((Path(folder) / LATEST).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def discard_from(save: str | Path, state: State, names: Sequence[str], asked: str) -> list[str]:
    """Forget the first visit to one of these stages and all after it; their folders are set aside, not deleted.

    Args:
        asked: the name that the user gave, for the error.

    Returns:
        The names of the folders.

    Raises:
        ConfigError: no such visit was begun.
    """
    first = next((place for place, visit in enumerate(state.done) if visit.stage in names), len(state.done))
    gone = [visit.folder for visit in state.done[first:]]
    started = state.running is not None and (bool(gone) or state.running.partition("@")[0] in names)
    if started:
        gone.append(state.running)
    if not gone:
        raise ConfigError(f"--redo-from {asked}: this run has not begun that stage. Leave it out.")
    state.done, state.running = state.done[:first], None
    write_state(save, state)  # first: a folder that is left over is found and told, a record without folder is not
    aside = aside_folder(save)
    for name in dict.fromkeys(gone):
        if (Path(save) / name).exists():
            aside.mkdir(parents=True, exist_ok=True)
            (Path(save) / name).rename(aside / name)
    return list(dict.fromkeys(gone))


def aside_folder(save: str | Path) -> Path:
    """Where to set things aside now."""
    return Path(save) / DISCARDED / time.strftime("%Y%m%d-%H%M%S")


def left_over(save: str | Path, state: State, stage: str, round: int) -> bool:
    """Whether the folder of a visit that is about to begin holds a checkpoint that this run knows nothing of."""
    name = folder_of(stage, round)
    return state.running != name and saved_step(Path(save) / name) is not None


def _cannot_write(save: str | Path, error: OSError) -> ConfigError:
    return ConfigError(f"save {save} cannot be written to ({error.strerror}). Give a folder where this user may write.")
