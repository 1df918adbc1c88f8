"""One denoising step of many requests, as a function of tensors: the decisions are those of the engine of this package.

The policy, the draw, the keys of the draws and the choice of positions are the functions that the engine calls
(model/policy.py, diffusion/); only their arguments are put together here, from what SGLang hands to an algorithm.

A block's state is plain numbers on the host: it belongs to its request, which SGLang may put into any batch, set aside
or drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.diffusion.sampling import Confidence, DrawRules, draw
from megatron_dlm.diffusion.unmasking import Remasking, UnmaskRules, scheduled_count, select
from megatron_dlm.model.policy import Vocabulary, policy_scores
from megatron_dlm.rollout.sglang.wire import Block, Rules

_TABLE_BYTES = 2**28  # of one [rows, V] table in float64


@dataclass(slots=True)
class BlockState:
    """A block while it is denoised.

    Attributes:
        rules: of its request.
        start: its first position in the text.
        taken: denoising steps of the response before this block.
        in_block: denoising steps of this block so far.
        steps, logprobs, sampling_logprobs: [B], 0 where nothing was unmasked.
    """

    rules: Rules
    start: int
    taken: int
    block_size: int
    in_block: int = 0
    steps: list[int] = field(init=False)
    logprobs: list[float] = field(init=False)
    sampling_logprobs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = [0] * self.block_size
        self.logprobs, self.sampling_logprobs = ([0.0] * self.block_size for _ in range(2))

    @property
    def steps_taken(self) -> int:
        """Denoising steps of the response so far."""
        return self.taken + self.in_block

    def finished(self, ids: Sequence[int]) -> Block:
        """The record of the block, given its tokens. SGLang spends one more pass to store their keys."""
        tokens = [int(token) for token in ids]
        return Block(self.start, tokens, self.steps, self.logprobs, self.sampling_logprobs, self.in_block + 1)


@torch.no_grad()
def denoise(
    ids: Tensor, masked: Tensor, logits: Tensor, states: Sequence[BlockState | None], vocabulary: Vocabulary
) -> list[bool]:
    """Take one denoising step in every block that has masked positions.

    Args:
        ids: int [S, B], changed in place where tokens are unmasked.
        masked: bool [S, B], before the step.
        logits: [S * B, V], of all positions.
        states: of the S blocks, changed in place; None only where nothing is masked.

    Returns:
        For each block whether nothing was masked: the pass that made these logits has then seen its final tokens.

    Raises:
        ValueError: a block has masked positions and no state.
    """
    open_ = masked.any(1).tolist()
    active = [row for row, is_open in enumerate(open_) if is_open]
    if not active:
        return [True] * len(open_)
    wanted = [states[row] for row in active]
    if any(state is None for state in wanted):
        raise ValueError("a request came without its rules: it was not submitted by this package")
    device, size = ids.device, ids.shape[1]
    rows = torch.tensor(active, device=device)
    inside, column = torch.nonzero(masked[rows], as_tuple=True)  # [N]: which of the active blocks, and where in it
    table = _Table.of(wanted, device)
    flat = rows[inside] * size + column
    drawn = _draw(logits, flat, table, inside, column, vocabulary)
    confidence = torch.zeros((len(active), size), dtype=torch.float64, device=device)
    confidence[inside, column] = drawn.confidence
    rules = UnmaskRules(
        table.remasking,
        scheduled_count(torch.full_like(table.denoising_steps, size), table.denoising_steps, table.in_block),
        table.threshold,
        table.entropy_bound,
        table.in_block + 1 >= table.denoising_steps,
    )
    chosen = select(rules, confidence, masked[rows])[inside, column]
    inside, column = inside[chosen], column[chosen]
    token = drawn.token[chosen]
    ids[rows[inside], column] = token.to(ids.dtype)
    places = torch.stack([inside, column]).tolist()
    numbers = torch.stack([drawn.logprob[chosen].double(), drawn.sampling_logprob[chosen].double()]).tolist()
    for state in wanted:
        state.in_block += 1
    for which, where, logprob, sampling_logprob in zip(*places, *numbers):
        state = wanted[which]
        state.steps[where] = state.steps_taken
        state.logprobs[where], state.sampling_logprobs[where] = logprob, sampling_logprob
    return [not is_open for is_open in open_]


@dataclass(frozen=True, slots=True)
class _Table:
    """The numbers of the active requests as tensors, each [A]."""

    stream: Tensor
    start: Tensor
    steps_taken: Tensor
    in_block: Tensor
    denoising_steps: Tensor
    remasking: Tensor
    confidence: Tensor
    top_k: Tensor
    greedy: Tensor
    temperature: Tensor
    top_p: Tensor
    threshold: Tensor
    entropy_bound: Tensor

    @classmethod
    def of(cls, states: Sequence[BlockState], device: torch.device) -> _Table:
        integers = [
            (
                state.rules.stream,
                state.start,
                state.steps_taken,
                state.in_block,
                state.rules.denoising_steps,
                Remasking[state.rules.remasking.upper()],
                Confidence[state.rules.confidence.upper()],
                state.rules.top_k,
            )
            for state in states
        ]
        reals = [
            (state.rules.policy_temperature, state.rules.top_p, state.rules.threshold, state.rules.entropy_bound)
            for state in states
        ]
        whole = (
            torch.tensor(integers, dtype=torch.int64).to(device).unbind(1)
        )  # two transfers, whatever there is to say
        broken = torch.tensor(reals, dtype=torch.float64).to(device).unbind(1)
        greedy = torch.tensor([state.rules.greedy for state in states]).to(device)
        return cls(*whole, greedy, *broken)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Draws at N positions, each [N]."""

    token: Tensor
    logprob: Tensor
    sampling_logprob: Tensor
    confidence: Tensor


def _draw(
    logits: Tensor, flat: Tensor, table: _Table, inside: Tensor, column: Tensor, vocabulary: Vocabulary
) -> _Drawn:
    """One token for each masked position, in parts of bounded size.

    Args:
        flat: int64 [N], rows of the logits. inside, column: int64 [N], lines of `table`, and places in the block.
    """
    rows = max(1, _TABLE_BYTES // (8 * logits.shape[-1]))
    parts = []
    for where, line, place in zip(flat.split(rows), inside.split(rows), column.split(rows)):
        temperature = table.temperature[line]
        uniform = uniforms(table.stream[line], table.start[line] + place, table.steps_taken[line])
        scores = policy_scores(logits[where], temperature, vocabulary)
        rules = DrawRules(table.greedy[line], table.top_k[line], table.top_p[line], temperature, table.confidence[line])
        parts.append(draw(scores, uniform, rules))
    names = ("token", "logprob", "sampling_logprob", "confidence")
    return _Drawn(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
