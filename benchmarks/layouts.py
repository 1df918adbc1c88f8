"""Three ways to lay out the same traces for TraceRL, each with the same targets, hence the same gradients.

  packed        ours: the clean text once, one noisy copy of a block per denoising step of it, the prompt once per group
  per step      one text per denoising step, as the algorithm is written: prompt, finished blocks, the block with its
                masks
  per round     as the published code for block models does it: row r is prompt, clean response and a noisy copy of the
                whole response in which every block stands as it did at its r-th step

The rivals are given what costs them nothing: no padding, texts cut after the last block that is read, many texts packed
into rows of the same budget, the head at target slots only. The published code pads to the longest prompt and response
and computes all logits.

All three are sets of items (diffusion/views.py) over the same views; they differ in which views share a clean text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.common import PACKED, PER_STEP, records
from megatron_dlm.diffusion.planner import ROW_MULTIPLE, Load, pack
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import Item
from megatron_dlm.rl.methods import TARGET, counts_of
from megatron_dlm.rl.rows import RLRow, Told, build_rows
from megatron_dlm.rl.update import UpdateSettings, plan_updates


def lay_out(
    layout: str,
    traces: Sequence[Trace],
    advantages: dict[tuple[str, int], float],
    settings: UpdateSettings,
    groups,
    mask_id: int,
    pad_id: int,
) -> tuple[list[RLRow], int, int]:
    """The rows of one update over all traces, on one process.

    Returns: the rows, their length, and how many tokens in them are not padding.
    """
    if layout == PACKED:  # the trainer's own path
        ((members, plan),) = plan_updates(records(traces, settings.states.grid, 0), settings, groups, 0)
        ours = {index: traces[graded.index] for index, graded in enumerate(members)}
        rows = build_rows(members, plan, ours, advantages, settings, 0, mask_id, pad_id)
        length = plan.length
    else:
        split = one_item_per_step if layout == PER_STEP else one_item_per_round
        rows, length = _rows_of(split, traces, advantages, settings, mask_id, pad_id)
    return rows, length, sum(int((row.row.layout.group >= 0).sum()) for row in rows)


def _rows_of(split, traces, advantages, settings: UpdateSettings, mask_id: int, pad_id: int) -> tuple[list[RLRow], int]:
    """Rows of items that `split` makes of each trace's item; what it makes shares nothing."""
    items: list[tuple[int, Item]] = []
    whole = [settings.states.item(trace, 0) for trace in traces]
    for response, item in enumerate(whole):
        items += [(response, part) for part in split(response, item)]
    loads = [Load(item.group, item.shared_length, item.own_length) for _, item in items]
    plan = pack(loads, settings.max_tokens_per_row, 1, ROW_MULTIPLE)
    advantage = np.array([advantages[trace.prompt_key, trace.sample] for trace in traces])
    told = Told([counts_of(item, TARGET) for item in whole], advantage, dict(enumerate(traces)), settings)
    laid = [build_row([items[index] for index in members], plan.length, mask_id, pad_id) for members in plan.ranks[0]]
    return [told.complete(row) for row in laid], plan.length


def one_item_per_step(response: int, item: Item) -> list[Item]:
    """Each view with a clean text of its own, cut before the view's block."""
    return [_with_views(item, f"{response} step {n}", [n]) for n in range(len(item.views.block))]


def one_item_per_round(response: int, item: Item) -> list[Item]:
    """Round r has one view of every block: its r-th, or the finished block where it took fewer steps."""
    views = item.views
    of_block = [np.flatnonzero(views.block == block) for block in np.unique(views.block)]
    parts = []
    for r in range(max(map(len, of_block), default=0)):
        part = _with_views(item, f"{response} round {r}", [mine[min(r, len(mine) - 1)] for mine in of_block])
        learned = np.array([r < len(mine) for mine in of_block])[:, None]
        shown = dataclasses.replace(part.views, masked=part.views.masked & learned, target=part.views.target & learned)
        parts.append(dataclasses.replace(part, views=shown))
    return parts


def _with_views(item: Item, name: str, chosen: Sequence[int]) -> Item:
    """The item with some of its views, in a group of its own."""
    return dataclasses.replace(item, group=f"{item.group} {name}", views=item.views.chosen(np.asarray(chosen)))
