"""Traces as JSON lines: what `generate` writes, and what `score` reads, from this program or another.

A line holds token ids and the step map of one response. Text is there for people only. Where a response ends inside a
block, the rest of that block (the tail) belongs to the line: its tokens were context of the response tokens that were
unmasked after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.data.records import steps_of, token_ids_of
from megatron_dlm.diffusion.trace import SamplingParams, Trace

_LARGE = 1e30
_SAMPLING = {
    "top_k": int,
    "top_p": float,
    "max_new_tokens": int,
    "denoising_steps": int,
    "remasking": str,
    "threshold": float,
    "confidence": str,
    "entropy_bound": float,
    "prefix_cache": bool,
    "horizon": int,
}
"""What a line says of its draw, mostly for the record: lines of older files or other programs need not say it. Scoring
reads the block size and the temperature, and under full attention the longest response and the horizon."""
_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def trace_record(trace: Trace, index: int, sample: int, text: str) -> dict:
    """A trace as one JSON object.

    Args:
        index: of the prompt in its file, from 0.
        sample: which response to that prompt.
        text: the response, decoded.
    """
    return {
        "index": index,
        "sample": sample,
        "text": text,
        "finish_reason": trace.finish_reason,
        "prompt_token_ids": trace.prompt_ids.tolist(),
        "token_ids": trace.response_ids.tolist(),
        "step_map": trace.steps.tolist(),
        "logprobs": trace.logprobs.tolist(),
        "sampling_logprobs": trace.sampling_logprobs.tolist(),
        "tail_token_ids": trace.tail_ids.tolist(),
        "tail_step_map": trace.tail_steps.tolist(),
        "num_forwards": trace.num_forwards,
        "block_size": trace.sampling.block_size,
        "temperature": trace.sampling.temperature,
        **{name: getattr(trace.sampling, name) for name in _SAMPLING},
    }


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One line of a file of traces.

    Attributes:
        where: file and line, for messages.
        record: the JSON object as it was read.
        trace: complete to the end of its terminal block; `trace.sampling` holds the block size and temperature to score
            it with, and under full attention the longest response.
        logprobs: float64 [R] that the line brought along, or None.
    """

    where: str
    record: dict
    trace: Trace
    logprobs: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What every line is held to: ids below `vocab_size` other than `mask_id`, texts of at most `max_length` tokens."""

    vocab_size: int
    mask_id: int
    max_length: int


def read_traces(
    path: str,
    limits: Limits,
    default_block_size: int | None,
    block_size: int | None = None,
    temperature: float | None = None,
) -> list[TraceLine]:
    """All traces of a file.

    Args:
        default_block_size: of lines that name none. None: of a model of full attention, whose lines have to name their
            decoding block and their longest response.
        block_size, temperature: where given, they beat what a line says.

    Raises:
        DataError: the file or a line of it cannot be used; the message names the line.
    """
    return [
        _read_line(record, f"{path}, line {number}", limits, default_block_size, block_size, temperature)
        for number, record in read_jsonl(path)
    ]


def _read_line(
    record: dict, where: str, limits: Limits, default: int | None, block_size: int | None, temperature: float | None
) -> TraceLine:
    ids = lambda field: token_ids_of(record, field, where, limits.vocab_size, limits.mask_id)
    prompt, response = ids("prompt_token_ids"), ids("token_ids")
    steps = steps_of(record, "step_map", "token_ids", where)
    own = _number(record, "block_size", where, whole=True, lowest=1)
    canvas = None if default is not None else _canvas(record, own, len(response), where)
    block = block_size or own or default
    tail, tail_steps = [], []
    if record.get("tail_token_ids") is not None or record.get("tail_step_map") is not None:
        tail = ids("tail_token_ids")
        tail_steps = steps_of(record, "tail_step_map", "tail_token_ids", where)
    tail, tail_steps = _terminal_block(len(prompt), steps, tail, tail_steps, block, own, where, canvas)
    whole = len(prompt) + len(response) + (len(tail) if canvas is None else canvas)
    if whole > limits.max_length:
        raise DataError(
            f"{where}: this text has {whole} tokens with {'its terminal block' if canvas is None else 'its canvas'}, "
            f"and the model has {limits.max_length} positions (--max-position-embeddings). Leave the line out."
        )
    if temperature is None:
        temperature = _number(record, "temperature", where, whole=False, lowest=0)
    integers = lambda values: np.asarray(values, dtype=np.int64)
    count = len(response)
    trace = Trace(
        prompt_ids=integers(prompt),
        response_ids=integers(response),
        tail_ids=integers(tail),
        steps=integers(steps),
        tail_steps=integers(tail_steps),
        logprobs=np.zeros(count),
        sampling_logprobs=np.zeros(count),
        weight_versions=np.zeros(count, dtype=np.int64),
        sampling=SamplingParams(
            temperature=1.0 if temperature is None else temperature,
            block_size=block,
            **{"denoising_steps": block} | _for_the_record(record, where),
        ),
        prompt_key="",
        sample=0,
        finish_reason="",
        num_forwards=0,
    )
    return TraceLine(where, record, trace, _logprobs(record, where))


def _canvas(record: dict, own: int | None, length: int, where: str) -> int:
    """Tokens of the canvas behind a response of `length` tokens, under full attention.

    Raises:
        DataError: the line does not say how long the response could have become, or in which blocks it was decoded.
    """
    longest = _number(record, "max_new_tokens", where, whole=True, lowest=1)
    _number(record, "horizon", where, whole=True, lowest=0)
    for name, value in (("block_size", own), ("max_new_tokens", longest)):
        if value is None:
            raise DataError(
                f"{where}: a model of full attention sees the masks behind a response too, and the line has no "
                f"'{name}' to say where they were. Add it."
            )
    if longest < length:
        raise DataError(
            f"{where}: 'token_ids' has {length} entries, more than 'max_new_tokens' {longest}. Correct one of them."
        )
    return longest - length


def _terminal_block(
    prompt: int,
    steps: list[int],
    tail: list[int],
    tail_steps: list[int],
    block: int,
    own: int | None,
    where: str,
    canvas: int | None = None,
) -> tuple[list[int], list[int]]:
    """The tail as the scoring blocks need it, tokens and steps.

    Args:
        prompt: tokens of the prompt. steps: step map of the response.
        block: tokens of a block in which the line is scored. own: of the block in which it was generated, if known.
        canvas: under full attention, where blocks are counted from the first response token: tokens that could have
            come behind the response.
    """
    if canvas is not None:
        prompt = 0
    length = prompt + len(steps)
    room = -length % block if canvas is None else min(-length % block, canvas)
    if len(tail) == room or not steps:
        return tail[:room], tail_steps[:room]
    if own not in (None, block) and (length + len(tail)) % own == 0:
        # Scored in other blocks than it grew in. What lies behind the last of these blocks is seen by nothing; where
        # their last one is longer than the text, the text ends within it, as it does in training.
        return tail[:room], tail_steps[:room]
    if tail:
        raise DataError(
            f"{where}: 'tail_token_ids' has {len(tail)} tokens, and {room} are missing to the end of the block of "
            f"{own or block} in which the response ends. Give the tail of that block, or the right block size."
        )
    start = max(length // block * block - prompt, 0)  # first response token of the terminal block
    inside, before = steps[start:], steps[:start]
    if own in (None, block) and set(inside) == {max(before, default=0) + 1}:
        # All were unmasked at the block's first step, when the whole block was hidden: what the tail became later
        # does not matter. It is hidden at any step up to then.
        return [0] * room, [inside[0] + 1] * room
    raise DataError(
        f"{where}: the response ends {room} tokens before the end of its block of {own or block}, and the line does "
        "not say what stood there while its tokens were unmasked. Add 'tail_token_ids' and 'tail_step_map', or name "
        "the right block size."
    )


def _number(record: dict, field: str, where: str, whole: bool, lowest: int) -> float | None:
    """A number, if the line has the field."""
    value = record.get(field)
    good = type(value) is int if whole else _is_number(value)
    if value is not None and not (good and value >= lowest):
        raise DataError(
            f"{where}: the field '{field}' is {str(value)[:40]!r}. Use a {'whole ' if whole else ''}number of {lowest} "
            "or more."
        )
    return value


def _for_the_record(record: dict, where: str) -> dict[str, object]:
    """The fields of `_SAMPLING` that the line has."""
    found = {}
    for name, kind in _SAMPLING.items():
        value = record.get(name)
        if value is None:
            continue
        if not (_is_number(value) if kind is float else type(value) is kind):
            raise DataError(
                f"{where}: the field '{name}' is {str(value)[:40]!r}, not {_NOUNS[kind]}. Correct it, or leave it out."
            )
        found[name] = value
    return found


def _is_number(value: object) -> bool:
    """Whether a JSON value is a finite number (nor a whole one that no float holds)."""
    return type(value) in (int, float) and abs(value) < _LARGE


def _logprobs(record: dict, where: str) -> np.ndarray | None:
    values = record.get("logprobs")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != len(record["token_ids"]):
        raise DataError(f"{where}: 'logprobs' is not a list of one number for each of 'token_ids'. Leave it out.")
    for index, value in enumerate(values):
        if not _is_number(value):
            raise DataError(
                f"{where}: entry {index} of 'logprobs' is {str(value)[:40]!r}, not a number. Leave 'logprobs' out."
            )
    return np.asarray(values, dtype=np.float64)
