"""Whether weights on a disk are the ones that they were: a hash of a checkpoint that takes no minutes to compute."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megatron_dlm.checkpoint import places
from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import CheckpointError

PIECE = 1 << 16  # bytes


def digest(checkpoint: LoadConfig) -> str:
    """A hash of the checkpoint that --load or --hf-checkpoint names: of the names and sizes of its files, and of their
    beginning, middle and end. The end of a file that torch has written lists checksums of all that is in it; training
    moves all weights, so that a piece of a safetensors file will do. Where the folder lies does not matter.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    if checkpoint.hf_checkpoint is not None:
        folder = Path(checkpoint.hf_checkpoint)
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    else:
        folder = places.find(checkpoint.load, checkpoint.ckpt_step)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = hashlib.blake2b(digest_size=16)
    try:
        for path in files:
            total.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            _add_pieces(total, path)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}). Check the checkpoint.") from None
    return total.hexdigest()


def _add_pieces(total: hashlib.blake2b, path: Path) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in sorted({0, max(0, size // 2 - PIECE // 2), max(0, size - PIECE)}):
            file.seek(start)
            total.update(file.read(PIECE))
