"""How samples lie in megatron-core's IndexedDataset: PREFIX.bin, PREFIX.idx, and PREFIX.json beside them.

A sample is a document of the index. Its sequences, int32, come in this order, and each has its mode:

    KEY          4 numbers: the sample's content key, 16 bytes
    PROMPT       token ids; none for a text without a prompt
    RESPONSE     token ids, the stop token included
    STEPS        step map, of samples that have one
    TAIL         token ids of the rest of the last block, of samples with a step map that name it
    TAIL_STEPS   their steps

Samples are whole: what does not fit a run's sequence length is cut or left out when they are read. PREFIX.json is
written last, so that what has it is complete:

    format, version                      what this is
    tokenizer                            fingerprint: vocab_size, eos_id, mask_id, hash of the vocabulary
    prompt_template, chat_template,
    response_prefix                      how questions became prompts
    seq_length, left_out                 samples above this length were left out, so many; null: all were kept
    samples, documents, step_maps        how many: all, those without a prompt, those with a step map
    prompt_tokens, response_tokens
    sources                              of each file: path, bytes, blake2b (of `b2sum -l 256`), counts as above
    bytes                                of .bin and .idx
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.sft_data import Sample

FORMAT, VERSION = "megatron_dlm samples", 1
DTYPE = np.dtype("<i4")
HEADER = 34  # bytes of an .idx before its arrays
ENDINGS = (".bin", ".idx", ".json")
AGAIN = "Run preprocess again."


class Mode(IntEnum):
    """What a sequence is."""

    KEY = 0
    PROMPT = 1
    RESPONSE = 2
    STEPS = 3
    TAIL = 4
    TAIL_STEPS = 5


def sequences_of(sample: Sample) -> list[np.ndarray]:
    """The sequences of a sample; the first of them has mode 0, the second mode 1, and so on."""
    parts: list[Sequence[int] | np.ndarray] = [
        np.frombuffer(bytes.fromhex(sample.key), DTYPE),
        sample.prompt_ids,
        sample.response_ids,
    ]
    if sample.step_map is not None:
        parts.append(sample.step_map)
        if sample.tail_ids:
            parts += [sample.tail_ids, sample.tail_steps]
    return [np.asarray(part, DTYPE) for part in parts]


def sample_from(sequences: Sequence[np.ndarray]) -> Sample:
    """What `sequences_of` took apart."""
    key, *parts = sequences
    return Sample(key.astype(DTYPE).tobytes().hex(), *(tuple(part.tolist()) for part in parts))


def read_description(prefix: str) -> dict[str, Any]:
    """PREFIX.json, after a look at the sizes of the other two files.

    Raises:
        DataError: a file is missing, cut or of another program or version.
    """
    path = Path(prefix + ".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(content, dict) and content.get("format") == FORMAT
    except FileNotFoundError:
        raise DataError(
            f"The indexed data {prefix} has no {path.name}, which preprocess writes last. Run preprocess to its end, "
            "or give the prefix of complete data."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the file and its path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        good = False
    if not good:
        raise DataError(f"{path} is not what preprocess writes beside its data, or was cut. {AGAIN}")
    if content.get("version") != VERSION:
        raise DataError(
            f"The indexed data {prefix} has version {content.get('version')}, and this program reads {VERSION}. {AGAIN}"
        )
    for ending in ENDINGS[:2]:
        file = Path(prefix + ending)
        try:
            found = file.stat().st_size
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}). Put it back beside {path.name}.") from None
        expected = content.get("bytes", {}).get(ending[1:])
        if found != expected:
            raise DataError(
                f"{file} has {found} bytes, and {path.name} says {expected}: it was cut or changed. {AGAIN}"
            )
    return content
