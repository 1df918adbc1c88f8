"""Who sees whom: the one visibility rule, as masks; and who comes before whom.

A row is a [T] sequence of tokens from many samples. Each token carries five integers (`Layout`); a query may attend to
a key iff the rule in `visible` says so. Every attention pattern of this package is an instance of it
(docs/architecture.md, 1).

Invariants (tests/diffusion/test_layout.py):
  - padding (group < 0) sees only itself, and nothing else sees padding;
  - a noisy view sees finished blocks before its own, and itself, nothing else;
  - two responses of one group never see each other;
  - a token sees its predecessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

PROMPT = -1  # `response` of the prompt's full blocks, which the whole group shares
CLEAN = 0  # `view` of finished text
PADDING = -1  # `group` of a padding token
_PADDING_TOKEN = {"group": PADDING, "response": PROMPT, "view": CLEAN, "block": 0, "position": 0}


@dataclass(frozen=True, slots=True)
class Layout:
    """Five integers per token of a row, each an int32 tensor of shape [T]."""

    group: Tensor
    response: Tensor
    view: Tensor
    block: Tensor
    position: Tensor

    def to(self, device: torch.device) -> Layout:
        return Layout(*(moved(getattr(self, field.name), device) for field in fields(self)))

    def padded(self, length: int) -> Layout:
        """The same with padding behind it, `length` tokens in all."""
        missing = length - len(self.group)
        filled = (F.pad(getattr(self, name), (0, missing), value=value) for name, value in _PADDING_TOKEN.items())
        return Layout(*filled)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; on the host only when it is all there, which torch leaves open otherwise."""
    return tensor.to(device, non_blocking=device.type != "cpu")


@dataclass(frozen=True, slots=True)
class Grid:
    """How positions fall into attention blocks.

    Attributes:
        block_size: tokens per attention block; None is one block for the whole sequence (full attention).
        anchor: 'absolute' counts blocks from position 0 of the sequence, as the rollout does. 'response' starts a block
            at the first response token and lets the first block of the prompt be ragged, as the published reference
            trains.
    """

    block_size: int | None
    anchor: str = "absolute"

    def offset(self, prompt_length: int) -> int:
        """What to add to a position before dividing by the block size."""
        if self.block_size is None or self.anchor == "absolute":
            return 0
        return -prompt_length % self.block_size

    def block_of(self, position, prompt_length: int):
        """Block index of positions (an int, or an integer array of any shape) in a sequence with this prompt."""
        if self.block_size is None:
            return position * 0
        return (position + self.offset(prompt_length)) // self.block_size

    def shared_prompt(self, prompt_length: int) -> int:
        """Length of the prompt's full blocks, which depend on no response and are stored once for a group."""
        if self.block_size is None:
            return 0
        return prompt_length - (prompt_length + self.offset(prompt_length)) % self.block_size

    def span(self, block: int, prompt_length: int, length: int) -> tuple[int, int]:
        """First position of a block and the one after its last, in a sequence of this length."""
        if self.block_size is None:
            return 0, length
        start = block * self.block_size - self.offset(prompt_length)
        return max(start, 0), min(start + self.block_size, length)


def visible(q: Layout, k: Layout) -> Tensor:
    """Dense mask of the visibility rule.

    Args:
        q, k: layouts of the queries [Tq] and the keys [Tk] (the same object within a row; different ones when keys come
            from a cache).

    Returns:
        bool [Tq, Tk], True where the query may attend to the key.

    Source: block diffusion, arXiv 2503.09573, section 3; extended here by groups, responses and views.
    """
    row, col = (slice(None), None), (None, slice(None))
    columns = ("group", "response", "view", "block")
    asks, seen = ([getattr(one, name)[at] for name in columns] for one, at in ((q, row), (k, col)))
    mask = sees(*asks, *seen)
    return mask | _self(q) if q is k else mask  # softmax needs one key per query, padding included


def sees(
    q_group: Tensor,
    q_response: Tensor,
    q_view: Tensor,
    q_block: Tensor,
    k_group: Tensor,
    k_response: Tensor,
    k_view: Tensor,
    k_block: Tensor,
) -> Tensor:
    """The visibility rule for a query and a key, element by element: integers of any shapes that broadcast to bool.
    Padding sees nothing by it, not even itself.
    """
    same_text = (q_group == k_group) & ((k_response == PROMPT) | (k_response == q_response))
    own_block = (q_view == k_view) & (q_block == k_block)
    finished_before = (k_view == CLEAN) & (k_block < q_block)
    return (q_group >= 0) & (k_group >= 0) & same_text & (own_block | finished_before)


def predecessors(layout: Layout, slots: Tensor) -> Tensor:
    """The slots of the tokens before some tokens, in the text as these see it.

    That is the token at the position before: in the token's own view of its block (under full attention, its own copy
    of the text); before the first token of a noisy block, in the finished text; before the first token of a response,
    in the prompt that the group shares. Before the first token of a text there is none, and the token itself stands
    for it.

    Args:
        slots: int64 [N], tokens that are not padding, in a row of T tokens.

    Returns:
        int64 [N].
    """
    if not len(slots):
        return slots
    columns = [column.long() for column in (layout.group, layout.response, layout.view, layout.position)]
    group, response, view, position = (column[slots] for column in columns)
    position = position - 1
    finished, shared = torch.full_like(slots, CLEAN), torch.full_like(slots, PROMPT)
    clean = _find(columns, (group, response, finished, position))
    prompt = _find(columns, (group, shared, finished, position))
    own = _find(columns, (group, response, view, position))
    own = torch.where(layout.block[own] == layout.block[slots], own, -1)  # a noisy view is of one block
    found = slots
    for candidate in (prompt, clean, own):  # the last that exists
        found = torch.where(candidate >= 0, candidate, found)
    return found


def _find(table: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Lines of a table, given as int64 columns [T], that equal the wanted lines, columns [N]: int64 [N], -1 where there
    is none.
    """
    keys, sought = torch.zeros_like(table[0]), torch.zeros_like(wanted[0])
    for column, values in zip(table, wanted, strict=True):
        both = torch.cat([column, values])
        low, width = both.min(), both.max() - both.min() + 1
        keys, sought = keys * width + (column - low), sought * width + (values - low)
    keys, line = keys.sort()
    place = torch.searchsorted(keys, sought).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == sought, line[place], -1)


def _self(layout: Layout) -> Tensor:
    return torch.eye(layout.group.numel(), dtype=torch.bool, device=layout.group.device)
