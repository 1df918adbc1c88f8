"""Pieces of indexed data: what one process makes of one chunk of a JSONL file, and how pieces become one.

A shard has a name that depends on the bytes of its chunk and on all settings that shape the result. So it is found
again, and used again, exactly where it would come out the same, whoever asks; a chunk that has changed has none yet.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dlm.data.indexed_format import DTYPE, HEADER, sequences_of
from megatron_dlm.data.jsonl import not_utf8, open_data, parse_line, told_by_path
from megatron_dlm.data.sft_data import num_pieces, sample_of

if TYPE_CHECKING:
    from megatron_dlm.data.tokenizer import Tokenizer

COUNTS = ("samples", "left_out", "documents", "step_maps", "prompt_tokens", "response_tokens")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a file: bytes `start` to `end` (None: all of a compressed one), from line `line`, counted from 1.
    `digest` is that of the bytes as they lie on the disk."""

    path: str
    start: int
    end: int | None
    line: int
    digest: str


@dataclass(frozen=True, slots=True)
class Source:
    """A file as it was found: its size, its hash, and its chunks in order."""

    path: str
    size: int
    blake2b: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes samples of lines. `name` stands for all of it, the files of the tokenizer included."""

    tokenizer: Tokenizer
    prompt_template: str
    apply_chat_template: bool
    seq_length: int | None
    name: str


def look_at(path: str, chunk_bytes: int) -> Source:
    """Read a file once: its hash, and where it can be cut.

    Raises:
        DataError: it cannot be read.
    """
    whole, chunks, start, line = _hash(32), [], 0, 1
    with told_by_path(path), open(path, "rb") as file:
        while block := file.read(chunk_bytes):
            block += file.readline()
            whole.update(block)
            chunks.append(Chunk(path, start, start + len(block), line, _hash(16, block).hexdigest()))
            start, line = start + len(block), line + block.count(b"\n")
    if path.endswith(".gz"):
        chunks = [Chunk(path, 0, None, 1, whole.hexdigest())]
    return Source(path, start, whole.hexdigest(), tuple(chunks))


def shard_of(folder: Path, chunk: Chunk, recipe: Recipe) -> str:
    """Prefix of a chunk's shard."""
    zipped = "gz" if chunk.end is None else ""
    return str(folder / _hash(16, "\x1f".join((recipe.name, chunk.digest, zipped)).encode()).hexdigest())


def counts_of(shard: str) -> Counter[str] | None:
    """What a complete shard holds; None where there is none."""
    try:
        said = json.loads(Path(shard + ".json").read_text())
        sizes = [os.path.getsize(shard + ending) for ending in (".bin", ".idx")]
        return Counter(said["counts"]) if said["bytes"] == sizes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_shard(shard: str, chunk: Chunk, recipe: Recipe, stopped: Callable[[], bool]) -> Counter[str] | None:
    """Write the shard of a chunk; it is complete when its .json is there.

    Args:
        stopped: whether to give up; then nothing is returned.

    Raises:
        DataError: a line cannot be used.
    """
    unfinished = f"{shard}.{os.getpid()}"
    builder = IndexedDatasetBuilder(unfinished + ".bin", np.int32, multimodal=True)
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    for number, record in _records(chunk):
        if stopped():
            return None
        sample = sample_of(
            record,
            f"{chunk.path}, line {number}",
            recipe.tokenizer,
            recipe.prompt_template,
            recipe.apply_chat_template,
        )
        prompt, response = len(sample.prompt_ids), len(sample.response_ids)
        if not num_pieces(prompt, response, sample.is_document, recipe.seq_length):
            counts["left_out"] += 1
            continue
        parts = sequences_of(sample)
        builder.add_document(np.concatenate(parts), [len(part) for part in parts], list(range(len(parts))))
        found = (1, 0, not prompt, sample.step_map is not None, prompt, response)
        counts.update(dict(zip(COUNTS, map(int, found), strict=True)))
    builder.finalize(unfinished + ".idx")
    sizes = []
    for ending in (".bin", ".idx"):
        sync(unfinished + ending)
        sizes.append(os.path.getsize(unfinished + ending))
        os.replace(unfinished + ending, shard + ending)
    write_text(shard + ".json", json.dumps({"counts": counts, "bytes": sizes}))
    return counts


def _records(chunk: Chunk) -> Iterator[tuple[int, dict]]:
    """The objects of a chunk, with their line numbers; one line at a time, for a compressed file may be of any size."""
    with told_by_path(chunk.path), open_data(Path(chunk.path)) as file:
        file.seek(chunk.start)
        position, number = chunk.start, chunk.line
        for raw in file:
            start = position + (len(codecs.BOM_UTF8) if not position and raw.startswith(codecs.BOM_UTF8) else 0)
            try:
                line = raw[start - position :].decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(chunk.path, number, start + error.start) from None
            if line.strip():
                yield number, parse_line(line, chunk.path, number)
            position, number = position + len(raw), number + 1
            if position == chunk.end:
                return


def join(shards: Sequence[str], prefix: str) -> None:
    """One .bin and one .idx of several, in order: the files that IndexedDatasetBuilder would have written, without a
    Python object for each sequence."""
    with open(prefix + ".bin", "wb") as joined:
        for shard in shards:
            with open(shard + ".bin", "rb") as file:
                shutil.copyfileobj(file, joined, 1 << 24)
    indices = [_Index(shard) for shard in shards]
    with open(prefix + ".idx", "wb") as joined:
        joined.write(indices[0].magic)
        num_sequences = sum(index.num_sequences for index in indices)
        num_documents = sum(len(index.documents) - 1 for index in indices)
        joined.write(np.array([num_sequences, num_documents + 1], "<u8").tobytes())
        for index in indices:
            joined.write(index.lengths.tobytes())
        offset = 0
        for index in indices:
            ends = offset + np.cumsum(index.lengths, dtype="<i8") * DTYPE.itemsize
            joined.write((ends - index.lengths * np.int64(DTYPE.itemsize)).astype("<i8").tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        joined.write(np.zeros(1, "<i8").tobytes())
        offset = 0
        for index in indices:
            joined.write((index.documents[1:] + offset).astype("<i8").tobytes())
            offset += index.num_sequences
        for index in indices:
            joined.write(index.modes.tobytes())
    for ending in (".bin", ".idx"):
        sync(prefix + ending)


class _Index:
    """The arrays of an .idx, mapped into memory."""

    def __init__(self, shard: str) -> None:
        raw = np.memmap(shard + ".idx", mode="r")
        self.magic = raw[: HEADER - 16].tobytes()
        self.num_sequences, bounds = (int(number) for number in raw[HEADER - 16 : HEADER].view("<u8"))
        cuts = np.cumsum([HEADER, 4 * self.num_sequences, 8 * self.num_sequences, 8 * bounds, self.num_sequences])
        self.lengths, _, self.documents, self.modes = (
            raw[start:end].view(kind) for start, end, kind in zip(cuts, cuts[1:], ("<i4", "<i8", "<i8", "<i1"))
        )


def write_text(path: str, text: str) -> None:
    """A small file that appears whole or not at all."""
    unfinished = f"{path}.{os.getpid()}"
    Path(unfinished).write_text(text, encoding="utf-8")
    sync(unfinished)
    os.replace(unfinished, path)


def sync(path: str) -> None:
    """Have a file on the disk before its name says that it is complete."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _hash(size: int, content: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(content, digest_size=size)
