"""Samples that `preprocess` has indexed, as a sequence: they stay on the disk until they are asked for.

    samples = IndexedSamples("data/math", tokenizer, seq_length=4096)
    samples[123_456_789]

The files are mapped into memory, so that all processes of a host share one copy of what was read of them, and opening
them reads the index once, array by array (100 million samples: some seconds). No object is kept per sample.

Invariants (tests/data/test_indexed.py):
  - the samples are those that `load_sft` reads from the same JSON lines, field by field, in the same order;
  - a pickle of it holds its place on the disk and no samples.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.indexed_format import AGAIN, HEADER, Mode, read_description, sample_from
from megatron_dlm.data.sft_data import Sample, piece_of

if TYPE_CHECKING:
    from megatron_dlm.data.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE = 1 << 20  # of the index, when it is looked through


class IndexedSamples:
    """The samples under one prefix that fit a sequence length.

    Attributes:
        left_out: how many records do not fit.
        longest: prompt tokens -> response tokens, the tail included, of the longest response to prompts of that length.
        step_maps: how many samples have a step map.
        identity: another text for other data, or for another sequence length where that makes a difference.
        description: PREFIX.json.

    Raises:
        DataError: a file is missing, cut or damaged, or another tokenizer has made the ids.
    """

    def __init__(self, prefix: str, tokenizer: Tokenizer, seq_length: int | None = None) -> None:
        self.prefix, self.seq_length = prefix, seq_length
        self.description = read_description(prefix)
        _check_tokenizer(prefix, self.description, tokenizer.fingerprint())
        self._data = _open(prefix)
        scan = _Scan(prefix, self._data, seq_length)
        self.left_out, self.longest, self.step_maps = scan.left_out, scan.longest, scan.step_maps
        # Documents that give no sample or several, by number; and the number of the first sample behind each.
        self._odd, self._behind = scan.odd, scan.odd + 1 + scan.surplus
        self._length = scan.num_documents + (int(scan.surplus[-1]) if len(scan.surplus) else 0)
        text = json.dumps([self.description, seq_length if len(self._odd) else None], sort_keys=True)
        self.identity = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(index)
        document, piece = self._place(index)
        first, last = self._data.document_indices[document : document + 2]
        sequences, _ = self._data[int(first) : int(last)]
        return piece_of(sample_from(sequences), piece, self.seq_length)

    def _place(self, index: int) -> tuple[int, int]:
        """In which document a sample is, and which piece of it."""
        passed = int(np.searchsorted(self._behind, index, side="right"))  # odd documents wholly before it
        surplus = int(self._behind[passed - 1] - self._odd[passed - 1] - 1) if passed else 0
        if passed < len(self._odd) and index >= self._odd[passed] + surplus:
            return int(self._odd[passed]), int(index - self._odd[passed] - surplus)
        return index - surplus, 0


class _Scan:
    """What the index says of all documents."""

    def __init__(self, prefix: str, data: Any, seq_length: int | None) -> None:
        bounds = data.document_indices
        self.num_documents = len(bounds) - 1
        self.left_out = self.step_maps = 0
        self.longest: dict[int, int] = {}
        odd, surplus = [], []
        for start in range(0, self.num_documents, _DOCUMENTS_AT_ONCE):
            part = bounds[start : start + _DOCUMENTS_AT_ONCE + 1]
            prompt, response, tail, steps = _lengths(prefix, data.index, part)
            pieces = np.ones(len(prompt), np.int64)
            if seq_length is not None:
                long = prompt + response > seq_length
                text = (prompt == 0) & ~steps
                pieces[long] = np.where(text[long], -(-response[long] // seq_length), 0)
                response = np.where(text, np.minimum(response, seq_length), response)
            self.left_out += int((pieces == 0).sum())
            self.step_maps += int((steps & (pieces > 0)).sum())
            _note_longest(self.longest, prompt[pieces > 0], (response + tail)[pieces > 0])
            where = np.flatnonzero(pieces != 1)
            odd.append(where + start)
            surplus.append(pieces[where] - 1)
        self.odd = np.concatenate([np.zeros(0, np.int64), *odd])
        self.surplus = np.cumsum(np.concatenate([np.zeros(0, np.int64), *surplus]))


def _lengths(prefix: str, index: Any, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of consecutive documents: tokens of prompt, response and tail, and whether there is a step map."""
    first, count = bounds[:-1], np.diff(bounds)
    at = slice(int(bounds[0]), int(bounds[-1]))
    lengths, modes = index.sequence_lengths[at].astype(np.int64), index.sequence_modes[at]
    # A document of 3, 4 or 6 sequences, with modes from 0 upwards.
    number = np.arange(len(modes)) - np.repeat(first - bounds[0], count)
    if not (np.isin(count, (Mode.RESPONSE + 1, Mode.STEPS + 1, Mode.TAIL_STEPS + 1)).all() and (modes == number).all()):
        raise DataError(f"The index {prefix}.idx does not hold samples as preprocess writes them. {AGAIN}")
    start = first - bounds[0]
    steps, with_tail = count > Mode.STEPS, count > Mode.TAIL
    tail = np.zeros(len(first), np.int64)
    tail[with_tail] = lengths[start[with_tail] + Mode.TAIL]
    return lengths[start + Mode.PROMPT], lengths[start + Mode.RESPONSE], tail, steps


def _note_longest(longest: dict[int, int], prompt: np.ndarray, response: np.ndarray) -> None:
    if len(prompt):
        most = np.zeros(int(prompt.max()) + 1, np.int64)
        np.maximum.at(most, prompt, response)
        for length in np.flatnonzero(most).tolist():
            longest[length] = max(longest.get(length, 0), int(most[length]))


def _open(prefix: str) -> Any:
    """The IndexedDataset.

    Raises:
        DataError: its index is not one, or does not fit itself or the data.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    with open(prefix + ".idx", "rb") as file:
        header = file.read(HEADER)
        size = file.seek(0, 2)
    sequences, bounds = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
    kind = (header[:9], header[9:17], header[17:18])
    known = kind == (b"MMIDIDX\x00\x00", (1).to_bytes(8, "little"), bytes([DType.int32.value]))
    if not known or bounds < 2 or size != HEADER + 13 * sequences + 8 * bounds:
        raise DataError(f"{prefix}.idx is not an index that preprocess has written. {AGAIN}")
    return IndexedDataset(prefix, multimodal=True, mmap=True)


def _check_tokenizer(prefix: str, description: dict[str, Any], own: dict[str, Any]) -> None:
    made = description.get("tokenizer", {})
    for name, word in (("vocab_size", "ids"), ("eos_id", "as its stop token"), ("mask_id", "as its mask token")):
        if made.get(name) != own[name]:
            advice = " and --mask-token-id" if name == "mask_id" else ""
            raise DataError(
                f"The indexed data {prefix} was made with another tokenizer than this run's: one with {made.get(name)} "
                f"{word}, and this one has {own[name]}. Run preprocess with the run's --tokenizer-model{advice}."
            )
    if made != own:
        raise DataError(
            f"The indexed data {prefix} was made with another tokenizer than this run's: both have "
            f"{own['vocab_size']} ids, but not for the same tokens. Run preprocess with the run's --tokenizer-model."
        )
