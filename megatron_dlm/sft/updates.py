"""The updates of fine-tuning, one after the other, as one rank computes them: what a loader hands to the device.

    for update in Updates(sampler, ...):
        train_step(state, update.rows, ...)

An update is a function of the samples' order, the seed and its number; nothing here knows devices or process groups,
so it can be prepared in another process, ahead of time. What a resumed run needs comes with each update: a loader may
be several ahead of the training.

Invariants (tests/sft/test_loader.py): targets and weights of an update, over all ranks, do not depend on how many there
are; a run that goes on after some update sees what would have come next.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_dlm.config.block_schedule import BlockSchedule
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.balance import load_of
from megatron_dlm.diffusion.context import Sharing
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import pack_parts
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.views import Item, split_views
from megatron_dlm.sft.objectives import Autoregressive, Objective, item_of, open_objective
from megatron_dlm.sft.texts import Text


class Sampler(Protocol):
    """Whose turn it is."""

    def take(self, count: int) -> list[Sample]: ...

    def progress(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the rows of an update are this rank's.

    Attributes:
        rank, ranks: its place among those that have rows of their own, and how many there are.
        row_multiple, rows_multiple: of a row's tokens, and of a rank's rows.
        sharing: of rows under context parallelism.
        mask_id, pad_id: tokens.
    """

    rank: int
    ranks: int
    row_multiple: int
    rows_multiple: int
    sharing: Sharing
    mask_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class Update:
    """One update.

    Attributes:
        rows: this rank's, on the host; their targets are named by the number of their item. length: T of each of them.
        num_predicted: D, tokens that the loss is divided by, of all ranks.
        causal_from: number of the first item of the autoregressive loss beside the objective.
        tokens: in the rows of all ranks, padding left out.
        samples: number of samples.
        block_size: that they are learned in.
        progress: of the samples after this update; JSON can hold it.
    """

    rows: list[Row]
    length: int
    num_predicted: int
    causal_from: int
    tokens: int
    samples: int
    block_size: int | None
    progress: dict[str, Any]


@dataclass(slots=True)
class Updates:
    """An endless iterator over the updates after `step` others.

    Attributes:
        sampler: gives samples; its place is the run's.
    """

    sampler: Sampler
    sft: SFTConfig
    blocks: BlockSchedule
    place: Place
    seed: int
    step: int = 0

    def __iter__(self) -> Iterator[Update]:
        return self

    def __next__(self) -> Update:
        samples = self.sampler.take(self.sft.global_batch_size)
        size = self.blocks.at(self.step)
        place, budget = self.place, self.sft.max_tokens_per_row
        drawn = sft_items(samples, self.step, self.seed, Grid(size), self.sft, place.pad_id)
        parts = [split_views(item, budget) for item in drawn.items]
        loads = [[load_of(part) for part in item] for item in parts]
        plan = pack_parts(loads, budget, place.ranks, place.row_multiple, rows_multiple=place.rows_multiple)
        sharing, rows = dataclasses.replace(place.sharing, block_size=size), []
        for members, which in zip(plan.ranks[place.rank], plan.parts[place.rank]):
            chosen = [(item, parts[item][part]) for item, part in zip(members, which)]
            row, _ = sharing.part(build_row(chosen, plan.length, place.mask_id, place.pad_id))
            rows.append(row)
        self.step += 1
        return Update(
            rows,
            sharing.length(plan.length),
            drawn.num_predicted,
            drawn.causal_from,
            plan.tokens,
            len(samples),
            size,
            self.sampler.progress(),
        )


@dataclass(frozen=True, slots=True)
class SFTItems:
    """The items of one update, without texts in which nothing was hidden; those from `causal_from` on are of the
    autoregressive loss beside the objective. num_predicted: D, the number of tokens to learn.
    """

    items: list[Item]
    causal_from: int
    num_predicted: int


def sft_items(samples: Sequence[Sample], step: int, seed: int, grid: Grid, sft: SFTConfig, pad_id: int) -> SFTItems:
    """Draw the masks of one update. Samples with the same prompt are one group: in a row they share it.

    Args:
        step: optimizer steps before this one. grid: blocks of the model in this step.
    """
    objective, beside = open_objective(sft), Autoregressive()
    seen: Counter[str] = Counter()  # a sample that comes twice in an update gets masks of its own each time
    items, causal, num_predicted = [], [], 0
    for number, sample in enumerate(samples):
        occasion = (step, sample.key, seen[sample.key]) if sft.redraw_masks else (sample.key,)
        seen[sample.key] += 1
        text = lay_out(sample, objective, grid, sft, pad_id)
        num_predicted += text.num_predicted
        views = objective.views(text, stream(seed, "sft-mask", *occasion), step)
        if len(views.block):
            items.append(item_of(_group(number, text), text, views))
        if sft.ar_loss_coef:
            text = lay_out(sample, beside, grid, sft, pad_id)
            views = beside.views(text, 0, step)
            if len(views.block):
                views = dataclasses.replace(views, weight=sft.ar_loss_coef * views.weight)
                causal.append(item_of(f"causal {_group(number, text)}", text, views))
    return SFTItems(items + causal, len(items), num_predicted)


def lay_out(sample: Sample, objective: Objective, grid: Grid, sft: SFTConfig, pad_id: int) -> Text:
    """A sample as the objective reads it."""
    return Text.of(sample, objective.grid(grid), pad_id, sft.loss_on_pad, sft.noise_prompt, sft.canvas_length)


def _group(number: int, text: Text) -> str:
    """What may share a prompt; where nothing is shared each sample of the update is a group of its own, for groups
    travel together.
    """
    shared = text.grid.shared_prompt(text.prompt_length)
    return repr(text.sample.prompt_ids) if shared else f"sample {number}"
