"""Where checkpoints lie, and how one takes its place.

    DIR/iter_0000010/                          a checkpoint
    DIR/latest_checkpointed_iteration.txt      "10"

A checkpoint is written beside its place, moved there when it is whole, and named in the text file last. One of the same
iteration that is already there changes places with it in one system call. So at every moment, and whatever a crash
leaves behind, the text file names a whole checkpoint. (Where the file system has no such call, as NFS may not, a crash
in the instant between two renames leaves the replaced one under .iter_0000010.replaced.)
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dlm.config.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    AssertionError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    CheckpointingException,
    CheckpointException,
)  # what torch and megatron-core raise over files that are missing, cut short or overwritten


def iteration_folder(directory: str | Path, iteration: int) -> Path:
    return Path(directory) / f"iter_{iteration:07d}"


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration of the newest whole checkpoint in a folder, or None if there is none (or no folder)."""
    path = Path(directory) / LATEST
    try:
        iteration = int(path.read_text(encoding="ascii"))
        if iteration < 0:
            raise ValueError(iteration)
        return iteration
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise CheckpointError(
            f"{path} does not hold an iteration number, so no finished save of this package wrote it. Write the number "
            "of a checkpoint in that folder into it, or choose one with --ckpt-step."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Check the folder.") from error


def find(directory: str | Path, iteration: int | None = None, flag: str = "--load") -> Path:
    """The folder of a checkpoint: of this iteration, or of the newest.

    Args:
        flag: that named the directory.

    Raises:
        CheckpointError: there is none.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"There is no checkpoint folder {directory}. Give {flag} a folder that a run wrote with --save."
        )
    if iteration is None:
        iteration = latest_iteration(directory)
    if iteration is None:
        raise CheckpointError(
            f"{directory} holds no finished checkpoint ({LATEST} is missing). Give {flag} a folder that a run wrote "
            "with --save."
        )
    folder = iteration_folder(directory, iteration)
    if not _is_distributed(folder):
        raise CheckpointError(
            f"{folder} is missing or not a whole checkpoint. Choose another iteration of {directory} with --ckpt-step."
        )
    return folder


def _is_distributed(folder: Path) -> bool:
    try:
        return dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    except (*DAMAGE, TypeError, AttributeError):  # its metadata.json is no JSON, or not what megatron-core wrote there
        return False


def keep_newest(directory: str | Path, current: int, count: int) -> list[int]:
    """Delete all but the `count` newest checkpoints up to iteration `current`, which always stays; returns what went.

    Later iterations stay too: a run that was started again from an earlier one has not reached them yet.
    """
    found = sorted(int(entry.name[5:]) for entry in Path(directory).glob("iter_" + 7 * "[0-9]"))
    old = [iteration for iteration in found if iteration < current]
    old = old[: max(0, len(old) - (count - 1))]
    for iteration in old:
        folder = iteration_folder(directory, iteration)
        doomed = folder.with_name(f".{folder.name}.deleted")  # so that a half deleted one is not taken for a whole one
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return old


def put_in_place(partial: Path, final: Path) -> None:
    """Move a whole checkpoint to its name; one of the same iteration that is already there is replaced."""
    if not final.exists():
        partial.rename(final)
        return
    if not _exchange(partial, final):  # a file system that cannot: the old one steps aside for a moment
        aside = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        partial.rename(final)
        aside.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step (Linux, renameat2); False where that is not possible."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def name_as_latest(directory: Path, iteration: int) -> None:
    temporary = directory / f".{LATEST}.new"
    with open(temporary, "w", encoding="ascii") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / LATEST)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: a file of it is missing or cut short ({reason_of(error)}). Choose "
            "another iteration, or write it again."
        ) from error


def reason_of(error: BaseException) -> str:
    """What the libraries said, short enough for a sentence."""
    if isinstance(error, CheckpointException) and error.failures:  # says only that some rank failed
        error = next(iter(error.failures.values()))[0]
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}".rstrip(" :.")
