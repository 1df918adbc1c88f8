"""Log-probabilities of given responses under the training model, in packed rows.

The rollout engine has no part in this: what an engine recorded, ours or another, is checked here against the forward
pass that training makes. Each response token gets two numbers, both under the policy (model/policy.py):

  trace   in the state in which the step map says that it was unmasked;
  block   with all response tokens of its block masked (the tail too), and the text before the block clean.

Under full attention blocks are those of decoding, counted from the first response token, and what stands behind the
block is masked, to the end of the longest response (diffusion/views.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.config.errors import CheckpointError, DataError
from megatron_dlm.data.records import content_key
from megatron_dlm.data.traces import TraceLine
from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import pack
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.views import Item, largest_part, split_views, trace_views
from megatron_dlm.model.head import target_policy
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.parallel.exchange import exchange_objects
from megatron_dlm.training.report import Report
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import forward_only

LEAST_ROW = 4096  # tokens of a row where nobody says
LINES_AT_ONCE = 128  # on one data-parallel rank: bounds the memory of prepared rows


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row and the temperature of the policy at each of its N targets, float64 [N]."""

    row: Row
    temperature: Tensor


def items_of(line: TraceLine, full_attention: bool = False) -> tuple[Item, Item]:
    """A line as it stands in rows: with the views of its trace, and with one fully masked view per block."""
    trace, size = line.trace, line.trace.sampling.block_size
    grid = Grid(None if full_attention else size)
    block = 1 + np.arange(len(trace.all_steps)) // size if full_attention else np.ones_like(trace.all_steps)
    steps, tail_steps = np.split(block, [len(trace.steps)])
    at_once = dataclasses.replace(trace, steps=steps, tail_steps=tail_steps)  # as if each block had taken a single step
    group = content_key(f"{grid.block_size}: {trace.prompt_ids.tolist()}")
    make = lambda one: Item(group, trace.tokens, len(trace.prompt_ids), trace_views(one, grid), grid)
    return make(trace), make(at_once)


def row_budget(lines: Sequence[TraceLine], budget: int | None, full_attention: bool = False) -> int:
    """Tokens of a row: those asked for, or enough for the longest line. Under full attention, where nothing is lost by
    that, the copies of one line may stand in several rows, and the largest copy has to fit.

    Raises:
        DataError: a line does not fit the row that was asked for; the message names it.
    """
    size = largest_part if full_attention else lambda item: item.shared_length + item.own_length
    needed = [max(size(item) for item in items_of(line, full_attention)) for line in lines]
    if budget is None:
        return max(LEAST_ROW, *needed)
    worst = max(needed)
    if worst > budget:
        with_what = "for the text and its masks" if full_attention else "with its noisy copies"
        raise DataError(
            f"{lines[needed.index(worst)].where}: this response needs a row of {worst} tokens {with_what}, "
            f"more than --max-tokens-per-row {budget}. Use at least {worst}, or leave the flag out."
        )
    return budget


def score(
    session: Session, state: TrainState, lines: Sequence[TraceLine], budget: int, report: Report
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of all lines. Collective over all ranks.

    Args:
        budget: of `row_budget`.

    Returns:
        On rank 0 for each line (trace, block), both float64 [R]; elsewhere nothing.
    """
    groups, found = session.groups, []
    at_once = LINES_AT_ONCE * groups.dp_size
    with report.bar(len(lines), "scoring") as bar:
        for start in range(0, len(lines), at_once):
            part = lines[start : start + at_once]
            found += [(2 * start + item, *rest) for item, *rest in _score_part(session, state, part, budget)]
            bar.update(len(part))
    speaks = groups.tp_rank == 0 and groups.is_pipeline_last
    received = exchange_objects({0: found} if speaks else {})
    if not groups.is_main:
        return []
    scores = [tuple(np.full(len(line.trace.response_ids), math.nan) for _ in range(2)) for line in lines]
    for item, index, values in received:
        scores[item // 2][item % 2][index] = values
    return scores


def _score_part(
    session: Session, state: TrainState, lines: Sequence[TraceLine], budget: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Score some lines in one run of the schedule.

    Yields on the last pipeline stage, for this rank's rows: (item, offsets in the response, log-probabilities); the
    items of line i are 2 i (trace) and 2 i + 1 (block).
    """
    groups, words = session.groups, session.tokenizer
    full = bool(session.model.full_attention)
    whole = [item for line in lines for item in items_of(line, full)]
    parts = [(number, part) for number, item in enumerate(whole) for part in split_views(item, budget)]
    loads = [load_of(part) for _, part in parts]
    plan = pack(loads, budget, groups.dp_size, session.row_multiple)
    temperature = np.array([line.trace.sampling.policy_temperature for line in lines], dtype=np.float64)
    rows = []
    for members in plan.ranks[groups.dp_rank]:
        row = build_row([parts[part] for part in members], plan.length, words.mask_id, words.pad_id)
        column = torch.from_numpy(temperature[row.targets.response.numpy() // 2])
        rows.append(ScoredRow(row.to(platform.device()), column.to(platform.device())))
    forward_step = _forward(session.vocabulary, session.parallel.loss_chunk_size)
    for scored, values in zip(rows, forward_only(state, rows, forward_step, plan.length)):
        response, index = (column.cpu().numpy() for column in (scored.row.targets.response, scored.row.targets.index))
        for item in np.unique(response):
            mine = response == item
            yield int(item), index[mine], values[mine]


def _forward(vocabulary: Vocabulary, chunk_size: int):
    """forward_step of training/step.py that returns each target's log-probability, float64 [N] on the host."""

    def forward_step(scored: ScoredRow, model):
        def loss_fn(output: Tensor) -> np.ndarray:
            labels = scored.row.targets.label
            logprob, _ = target_policy(model.module, output, labels, scored.temperature, vocabulary, chunk_size)
            return logprob.double().cpu().numpy()

        return model.module.forward_row(scored.row, headless=chunk_size > 0), loss_fn

    return forward_step


def scored_records(lines: Sequence[TraceLine], scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """The lines as they were read, with the log-probabilities, and the block size and temperature they hold for.

    Raises:
        CheckpointError: a log-probability is not a number.
    """
    for line, both in zip(lines, scores, strict=True):
        if not all(np.isfinite(values).all() for values in both):
            raise CheckpointError(
                f"{line.where}: this model gives a token a log-probability that is not a finite number. Its weights "
                "are broken; load another checkpoint."
            )
    return [
        line.record
        | {
            "trace_logprobs": trace.tolist(),
            "block_logprobs": block.tolist(),
            "block_size": line.trace.sampling.block_size,
            "temperature": line.trace.sampling.temperature,
        }
        for line, (trace, block) in zip(lines, scores, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the log-probabilities that lines brought along lie from those of their traces.

    mean, largest: |difference| over `tokens` tokens. where, token: line and offset in the response of the largest.
    """

    tokens: int
    mean: float
    largest: float
    where: str
    token: int


def compare(lines: Sequence[TraceLine], scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> Comparison | None:
    """Over the lines that have `logprobs`; None if no token does."""
    total, tokens, largest, where, token = 0.0, 0, -1.0, "", 0
    for line, (trace, _) in zip(lines, scores, strict=True):
        if line.logprobs is None or not len(trace):
            continue
        difference = np.abs(line.logprobs - trace)
        total, tokens = total + float(difference.sum()), tokens + len(difference)
        if difference.max() > largest:
            largest, where, token = float(difference.max()), line.where, int(difference.argmax())
    return Comparison(tokens, total / tokens, largest, where, token) if tokens else None


def summarize(lines: Sequence[TraceLine], scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Counts and means over tokens (0 where there are none)."""
    tokens = sum(len(trace) for trace, _ in scores)
    mean = lambda kind: float(sum(both[kind].sum() for both in scores) / max(tokens, 1))
    metrics = {
        "score/lines": float(len(lines)),
        "score/tokens": float(tokens),
        "score/trace_logprob": mean(0),
        "score/block_logprob": mean(1),
    }
    found = compare(lines, scores)
    if found is not None:
        metrics |= {"score/logprob_abs_diff": found.mean, "score/logprob_abs_diff_max": found.largest}
    return metrics


def table(metrics: dict[str, float], found: Comparison | None) -> str:
    """The summary, for people."""
    rows = [
        ("lines", f"{metrics['score/lines']:.0f}"),
        ("response tokens", f"{metrics['score/tokens']:.0f}"),
        ("mean log-probability, trace", f"{metrics['score/trace_logprob']:.6f}"),
        ("mean log-probability, block", f"{metrics['score/block_logprob']:.6f}"),
    ]
    if found is not None:
        rows += [
            ("tokens with 'logprobs'", str(found.tokens)),
            ("mean |logprobs - trace|", f"{found.mean:.3e}"),
            ("max |logprobs - trace|", f"{found.largest:.3e}"),
            ("  where", f"{found.where}, entry {found.token} of its token_ids"),
        ]
    return "\n".join(f"{name:30} {value}" for name, value in rows)
