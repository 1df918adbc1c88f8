"""Given responses: lines of a file as step maps are made for them, and lines with step maps to write."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.config.errors import CheckpointError, DataError
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.data.sft_data import sample_of
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.data.traces import trace_record
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.trace import Trace

LEAST_ROW = 4096  # tokens of a row where nobody says
_OF_A_DRAW = ("index", "sample", "sampling_logprobs")  # what a line says of a response that was drawn


@dataclass(frozen=True, slots=True)
class Given:
    """One line of the file.

    Attributes:
        where: file and line, for messages.
        record: the JSON object as it was read.
        prompt_ids, response_ids: int64, the stop token included.
        tail_ids: int64, the pad tokens that fill the last block, as in fine-tuning; none under full attention.
        canvas: under full attention, tokens that the response is written on: what it leaves of them are masks.
    """

    where: str
    record: dict
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    tail_ids: np.ndarray
    canvas: int = 0

    @property
    def length(self) -> int:
        """Tokens of the text with what stands behind it."""
        return len(self.prompt_ids) + max(len(self.response_ids) + len(self.tail_ids), self.canvas)


def read_given(
    path: str,
    tokenizer: Tokenizer,
    prompt_template: str,
    apply_chat_template: bool,
    grid: Grid,
    max_length: int,
    canvas: int = 0,
) -> list[Given]:
    """All lines of a file, read as fine-tuning reads them (data/sft_data.py).

    Args:
        grid: of attention, absolute.
        max_length: positions of the model.
        canvas: of `Given`.

    Raises:
        DataError: a line cannot be read, has no response, or has more tokens than the model positions.
    """
    lines = []
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        sample = sample_of(record, where, tokenizer, prompt_template, apply_chat_template)
        prompt, response = (np.array(ids, dtype=np.int64) for ids in (sample.prompt_ids, sample.response_ids))
        written = len(prompt) + len(response)
        room = -written % grid.block_size if grid.block_size is not None and len(response) else 0
        tail = np.full(room, tokenizer.pad_id, dtype=np.int64)
        given = Given(where, record, prompt, response, tail, canvas)
        if given.length > max_length:
            with_tail = " with its last block" if grid.block_size else " with its canvas" if canvas else ""
            raise DataError(
                f"{where}: this text has {given.length} tokens{with_tail}, and the model has {max_length} "
                "positions (--max-position-embeddings). Leave the line out, or shorten it."
            )
        lines.append(given)
    return lines


def row_budget(lines: Sequence[Given], budget: int | None, grid: Grid) -> int:
    """Tokens of a row: those asked for, or enough for the longest line. A line whose copies do not fit one row is cut
    between them; a copy with what it reads has to fit.

    Raises:
        DataError: one does not fit the row that was asked for; the message names the line.
    """
    size = grid.block_size
    # A copy of the last block reads all blocks before it, and adds itself: the text once.
    longest = max(lines, key=lambda given: given.length)
    if budget is None:
        copies = lambda given: given.length - len(given.prompt_ids) // size * size
        whole = [given.length if size is None else given.length + copies(given) for given in lines]
        return max(LEAST_ROW, *whole)
    if longest.length > budget:
        raise DataError(
            f"{longest.where}: this text needs a row of {longest.length} tokens, more than --max-tokens-per-row "
            f"{budget}. Use at least {longest.length}, or leave the flag out."
        )
    return budget


def ids_digest(lines: Sequence[Given]) -> str:
    """A hash of the token ids of all lines: of what tokenizer and templates made of the texts."""
    total = hashlib.blake2b(digest_size=16)
    for given in lines:
        for ids in (given.prompt_ids, given.response_ids, given.tail_ids):
            total.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
    return total.hexdigest()


def file_digest(path: str) -> str:
    """A hash of what a file holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def given_record(given: Given, trace: Trace, tokens_per_step: int, tokenizer: Tokenizer) -> dict:
    """The line as it was read, with its trace as `generate` writes one.

    Raises:
        CheckpointError: a log-probability is not a number.
    """
    if not np.isfinite(trace.logprobs).all():
        raise CheckpointError(
            f"{given.where}: this model gives a token a log-probability that is not a finite number. Its weights are "
            "broken; load another checkpoint."
        )
    made = trace_record(trace, 0, 0, tokenizer.decode(trace.response_ids.tolist(), skip_special_tokens=True))
    made = {name: value for name, value in made.items() if name not in _OF_A_DRAW}
    made["finish_reason"] = "stop" if tokenizer.eos_id in trace.response_ids[-1:] else "length"
    kept = {name: value for name, value in given.record.items() if name != "sampling_logprobs"}  # of another order
    return kept | made | {"tokens_per_step": tokens_per_step}


def add_totals(totals: dict[str, float], traces: Sequence[Trace]) -> dict[str, float]:
    """Sums over lines, with some more of them."""
    sums = {
        "lines": len(traces),
        "tokens": sum(len(trace.response_ids) for trace in traces),
        "steps": sum(len(np.unique(trace.steps)) for trace in traces),
        "logprob": float(sum(trace.logprobs.sum() for trace in traces)),
    }
    return {name: totals.get(name, 0) + value for name, value in sums.items()}


def summarize(totals: dict[str, float]) -> dict[str, float]:
    """Means over all tokens, from the sums."""
    return {
        "trace/lines": float(totals["lines"]),
        "trace/tokens": float(totals["tokens"]),
        "trace/tokens_per_step": totals["tokens"] / max(totals["steps"], 1),
        "trace/logprob": totals["logprob"] / max(totals["tokens"], 1),
    }


def describe(metrics: dict[str, float], output: str) -> str:
    """`summarize` in words."""
    value = lambda name: metrics[f"trace/{name}"]
    return (
        f"{value('lines'):.0f} step maps in {output}: {value('tokens'):.0f} response tokens, "
        f"{value('tokens_per_step'):.2f} per step, mean log-probability {value('logprob'):.4f}"
    )
