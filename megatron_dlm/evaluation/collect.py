"""The order in which a model prefers to unmask given responses: step maps without a rollout.

A response is hidden and shown again, block by block; at each step the model is asked for all hidden tokens of a block,
and those n are shown whose true token it gives the highest probability under the policy (model/policy.py, temperature
1; of equal ones the first). So the text stays what it is, and its step map is that of static unmasking with n tokens.

  block models     The text before a block is the true one, whatever happens there. So all blocks take their k-th
                   step in the same forward pass, as one noisy copy each around one clean text: ceil(B / n) passes in
                   all. The last block is filled with pad tokens, as in fine-tuning, and these are unmasked with the
                   others.
  full attention   A copy is the whole text, with all masks that are left, and blocks go one after the other, counted
                   from the first response token. Behind the response stands nothing, or what is left of its canvas.

Invariants (tests/evaluation/test_collect.py):
  - step maps are those of a naive loop over one block of one response at a time;
  - log-probabilities are those that `score` finds for the trace;
  - in float64 neither rows nor processes matter; in fp32 they round, and tokens that are almost equally probable may
    change places.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.data.records import content_key
from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import pack
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.views import Item, Mask, split_views, views_of
from megatron_dlm.evaluation.given import Given
from megatron_dlm.model.head import target_policy
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.parallel.exchange import broadcast_object, exchange_objects, most_anywhere
from megatron_dlm.training.setup import Session
from megatron_dlm.training.state import TrainState
from megatron_dlm.training.step import forward_only


@dataclass(frozen=True, slots=True)
class Way:
    """How responses are unmasked.

    Attributes:
        grid: of attention.
        block_size: tokens that are decoded together; in block models those of an attention block.
        per_step: most tokens of a block that a step unmasks.
    """

    grid: Grid
    block_size: int
    per_step: int

    @property
    def full_attention(self) -> bool:
        return self.grid.block_size is None


class Unmasking:
    """A response on its way from hidden to shown.

    Attributes, one entry for each token behind the prompt, the tail included:
        block: int64, which block it is decoded in, from 0.
        step: int64, the step of its block at which it was unmasked, from 1; 0 while it is hidden.
        logprob: float64, of the token in the state in which it was unmasked.
    """

    def __init__(self, given: Given, way: Way) -> None:
        self.given, self.way = given, way
        prompt, count = len(given.prompt_ids), len(given.response_ids) + len(given.tail_ids)
        before = 0 if way.full_attention else prompt % way.block_size
        self.block = (before + np.arange(count)) // way.block_size
        self.step = np.zeros(count, dtype=np.int64)
        self.logprob = np.zeros(count)
        self._steps_taken = np.zeros(int(self.block.max(initial=-1)) + 1, dtype=np.int64)
        self._tokens = np.concatenate([given.prompt_ids, given.response_ids, given.tail_ids])
        self._group = content_key(f"{way.grid.block_size}: {given.prompt_ids.tolist()}")

    @property
    def is_done(self) -> bool:
        return bool(self.step.all())

    @property
    def cost(self) -> int:
        """Tokens that all its passes compute."""
        item = self.item()
        passes = -(-np.bincount(self.block, minlength=1) // self.way.per_step)
        tokens = item.shared_length + item.own_length
        return int(tokens * (passes.sum() if self.way.full_attention else passes.max()))

    def item(self) -> Item:
        """The state of the text, with all tokens predicted that the next step chooses from."""
        hidden = self.step == 0
        asked = hidden
        if self.way.full_attention and hidden.any():
            asked = hidden & (self.block == self.block[hidden.argmax()])
        prompt = len(self.given.prompt_ids)
        behind = self.given.length - len(self._tokens)
        hidden, asked = np.pad(hidden, (0, behind), constant_values=True), np.pad(asked, (0, behind))
        views = views_of(prompt, self.given.length, self.way.grid, [Mask(hidden, asked, np.ones(len(hidden)))])
        return Item(self._group, self._tokens, prompt, views, self.way.grid)

    def unmask(self, index: np.ndarray, logprob: np.ndarray) -> None:
        """Take a step in every block that was asked for.

        Args:
            index: int64 [N], places behind the prompt of all tokens that were asked for, in any order.
            logprob: float64 [N], of the true tokens there.
        """
        order = np.lexsort((index, -logprob, self.block[index]))  # by block, then the surest, then the first
        index, logprob, block = index[order], logprob[order], self.block[index[order]]
        rank = np.arange(len(block)) - np.searchsorted(block, block)
        chosen = rank < self.way.per_step
        self._steps_taken[np.unique(block)] += 1
        self.step[index[chosen]] = self._steps_taken[block[chosen]]
        self.logprob[index[chosen]] = logprob[chosen]

    def steps(self) -> np.ndarray:
        """int64, the step of the whole response at which each token was unmasked, from 1."""
        before = np.cumsum(self._steps_taken) - self._steps_taken
        return before[self.block] + self.step


def collect(
    session: Session,
    state: TrainState,
    lines: Sequence[Given],
    way: Way,
    budget: int,
    lines_at_once: int,
    keep: Callable[[list[Trace]], None],
) -> None:
    """Find the step maps of all lines, some at a time, in order. Collective over all ranks.

    Args:
        budget: tokens of a row (`given.row_budget`).
        lines_at_once: for each data-parallel rank.
        keep: called on all ranks when the next lines are done; with their traces on rank 0, elsewhere with nothing.
    """
    at_once = lines_at_once * session.groups.dp_size
    for start in range(0, len(lines), at_once):
        keep(_collect_part(session, state, lines[start : start + at_once], way, budget))


def _collect_part(session: Session, state: TrainState, lines: Sequence[Given], way: Way, budget: int) -> list[Trace]:
    groups = session.groups
    everything = [Unmasking(given, way) for given in lines]
    mine = _deal([one.cost for one in everything], groups.dp_size)[groups.dp_rank]
    work = [everything[number] for number in mine]
    while _step(session, state, [one for one in work if not one.is_done], budget):
        pass
    found = [(number, everything[number].steps(), everything[number].logprob) for number in mine]
    speaks = groups.tp_rank == 0 and groups.is_pipeline_first
    received = exchange_objects({0: found} if speaks else {})
    pad_id = session.tokenizer.pad_id
    return [trace_of(lines[number], way, *found, pad_id) for number, *found in sorted(received, key=_first)]


def _first(found: tuple) -> int:
    return found[0]


def _deal(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Lines for each data-parallel rank: the most expensive first, to the rank that has least; each rank's in order."""
    ranks = [(0, rank) for rank in range(num_ranks)]
    dealt: list[list[int]] = [[] for _ in ranks]
    for line in sorted(range(len(costs)), key=lambda line: (-costs[line], line)):
        load, rank = heapq.heappop(ranks)
        dealt[rank].append(line)
        heapq.heappush(ranks, (load + costs[line], rank))
    return [sorted(lines) for lines in dealt]


def _step(session: Session, state: TrainState, work: Sequence[Unmasking], budget: int) -> bool:
    """One step of all responses of this rank that are not done; whether any rank had some. Collective.

    Each data-parallel rank packs its own. What all of them must have in common is the number of rows and their length,
    because ranks may share experts.
    """
    groups, words = session.groups, session.tokenizer
    parts = [(number, part) for number, one in enumerate(work) for part in split_views(one.item(), budget)]
    plan = pack([load_of(part) for _, part in parts], budget, 1, session.row_multiple, session.rows_multiple)
    members = [*plan.ranks[0]]
    num_parts, num_rows, length = most_anywhere(len(parts), len(members), plan.length)
    if not num_parts:
        return False
    members += [()] * (num_rows - len(members))
    rows = [build_row([parts[part] for part in row], length, words.mask_id, words.pad_id) for row in members]
    on_device = [row.to(platform.device()) for row in rows]
    forward_step = _forward(session.vocabulary, session.parallel.loss_chunk_size)
    values = forward_only(state, on_device, forward_step, length, collect="all")
    if groups.tp_size > 1:  # they agree to the last bit; what depends on it is too much to rely on that
        values = broadcast_object(values, src=0, group=groups.tp)
    for number, index, logprob in _by_response(rows, values):
        work[number].unmask(index, logprob)
    return True


def _by_response(rows: Sequence[Row], values: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Per response (its number, places of the tokens, log-probabilities), from all rows that hold parts of it."""
    response = np.concatenate([row.targets.response.numpy() for row in rows])
    order = np.argsort(response, kind="stable")
    index = np.concatenate([row.targets.index.numpy() for row in rows])[order]
    logprob = np.concatenate(values)[order]
    numbers, starts = np.unique(response[order], return_index=True)
    for number, places, found in zip(numbers, np.split(index, starts[1:]), np.split(logprob, starts[1:])):
        yield int(number), places, found


def _forward(vocabulary: Vocabulary, chunk_size: int):
    """forward_step of training/step.py that returns each target's log-probability, float64 [N] on the host."""

    def forward_step(row: Row, model):
        def loss_fn(output: Tensor) -> np.ndarray:
            logprob, _ = target_policy(model.module, output, row.targets.label, 1.0, vocabulary, chunk_size)
            return logprob.to(torch.float64).cpu().numpy()

        return model.module.forward_row(row, headless=chunk_size > 0), loss_fn

    return forward_step


def trace_of(given: Given, way: Way, steps: np.ndarray, logprob: np.ndarray, tail_id: int) -> Trace:
    """The trace of a response. What is left of its last block on a canvas is a tail that no step decides.

    Args:
        steps, logprob: [R + tail], as `Unmasking` has them.
    """
    count = len(given.response_ids)
    left = max(min(-count % way.block_size, given.canvas - count), 0) if way.full_attention and count else 0
    tail, never = np.full(left, tail_id, dtype=np.int64), np.full(left, steps.max(initial=0) + 1)
    return Trace(
        prompt_ids=given.prompt_ids,
        response_ids=given.response_ids,
        tail_ids=np.concatenate([given.tail_ids, tail]),
        steps=steps[:count],
        tail_steps=np.concatenate([steps[count:], never]),
        logprobs=logprob[:count],
        sampling_logprobs=logprob[:count],
        weight_versions=np.zeros(count, dtype=np.int64),
        sampling=SamplingParams(
            temperature=1.0,
            max_new_tokens=max(count, given.canvas, 1),  # under full attention: where the masks behind it end
            block_size=way.block_size,
            denoising_steps=-(-way.block_size // way.per_step),
            remasking="static",
            prefix_cache=not way.full_attention,
        ),
        prompt_key="",
        sample=0,
        finish_reason="stop",
        num_forwards=int(steps.max(initial=0)),
    )
