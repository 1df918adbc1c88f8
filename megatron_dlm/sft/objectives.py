"""What is learned from a text: objectives of supervised fine-tuning, a small class each.

An objective turns a text into views: copies of its blocks, what is hidden in each, what of that is predicted, and what
that weighs. With D tokens to learn in an update, the loss of all of them is

    loss = 1/D * sum over targets of weight * -log p(token | what its view shows)

  Elbo            each block hidden at a ratio t of its own, weight 1/t: in expectation over t and masks, the bound on
                  the negative log-likelihood per token of a block diffusion model (BD3-LM, arXiv 2503.09573, eq. 8;
                  SDAR, arXiv 2510.06303); under full attention, or with one ratio for the whole text, that of a masked
                  diffusion model (MDLM, arXiv 2406.07524, eq. 10; LLaDA, arXiv 2502.09992).
  RandomMasking   the same with one ratio for a response and all hidden tokens alike: the baseline of TraceRL (arXiv
                  2509.06949, section 4.1).
  SemiAR          each block behind finished text, and under full attention each slice of a response behind finished
                  text and before masks; all hidden tokens alike (arXiv 2509.06949, section 4.1).
  Trace           each token in the state in which a model decided it (the same, section 4.1).
  Autoregressive  each token behind the finished text before it.

Whatever draws masks can draw them in complementary pairs (Fast-dLLM v2, arXiv 2509.26328), of a band of ratios, with at
least one token hidden in each block (Stable-DiffCoder, arXiv 2601.15892), and several times; their weights are divided
by the number of masks. With at least one token the loss of Elbo is no bound any more: blocks in which the draw hides
nothing are learned too, with the weight of their small ratio.

Invariants (tests/sft/test_objectives.py): each loss is that of a plain loop over single blocks; that of Elbo over all
masks, weighed by their probability, is the bound written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_dlm.config.sft_objective import SFTObjectiveConfig, with_objective
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.masking import MaskSchedule
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.views import Item, Mask, Views, causal_views, trace_views, views_of
from megatron_dlm.sft.texts import Text


class Objective(Protocol):
    """What is learned from a text."""

    def views(self, text: Text, stream: int, step: int) -> Views:
        """Its views, without any if nothing happens to be hidden.

        Args:
            stream: keys.stream(...) of this text, for what is drawn.
            step: optimizer steps before this one, for what changes with them.
        """

    def grid(self, grid: Grid) -> Grid:
        """Blocks that the text is laid out in, where the model's are `grid`."""


@dataclass(frozen=True, slots=True)
class Masking:
    """How masks are drawn, and what their tokens weigh.

    Attributes:
        schedule: of their ratios.
        draws: masks, or pairs of them.
        in_pairs: draw complementary pairs.
        warmup: optimizer steps over which the largest ratio rises from the smallest; weights are 1 until then.
    """

    schedule: MaskSchedule
    draws: int = 1
    in_pairs: bool = False
    warmup: int = 0

    def masks(self, text: Text, blocks: np.ndarray, stream: int, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(hidden, weight) of each mask, bool and float64 [R], over what is shown behind the prompt; blocks: of those
        R positions. What stands behind the text is hidden always.
        """
        schedule, position = self._at(step), text.positions
        drawn = position < len(text.tokens)
        tensors = [torch.from_numpy(column[drawn]) for column in (position, blocks)]
        learned = torch.from_numpy(position[drawn] < text.until)
        found = []
        for number in range(self.draws):
            if self.in_pairs:
                found += schedule.pair(stream, *tensors, number, learned)
            else:
                found.append(schedule.draw(stream, *tensors, number, learned))
        behind = len(position) - int(drawn.sum())
        return [
            (
                np.pad(hidden.numpy(), (0, behind), constant_values=True),
                np.pad(weight.numpy(), (0, behind)) / len(found),
            )
            for hidden, weight in found
        ]

    def _at(self, step: int) -> MaskSchedule:
        whole = self.schedule
        if step >= self.warmup:
            return whole
        top = whole.min_ratio + (whole.max_ratio - whole.min_ratio) * (step + 1) / self.warmup
        return MaskSchedule(whole.per, whole.min_ratio, 1.0, top, whole.at_least_one)


@dataclass(frozen=True, slots=True)
class Elbo:
    """Blocks with masks from a schedule, and its weights; `RandomMasking` differs in the schedule alone."""

    masking: Masking

    def grid(self, grid: Grid) -> Grid:
        return grid

    def views(self, text: Text, stream: int, step: int) -> Views:
        position, learned = text.positions, text.positions < text.until
        drawn = self.masking.masks(text, text.grid.block_of(position, text.prompt_length), stream, step)
        masks = [Mask(hidden, hidden & learned, weight) for hidden, weight in drawn]
        return views_of(text.prompt_length, text.length, text.grid, masks)


@dataclass(frozen=True, slots=True)
class SemiAR:
    """Slices behind finished text. In a model of attention blocks these are its blocks.

    Attributes:
        slice_size: tokens of a slice under full attention, counted from the first that is learned. What comes behind a
            slice is hidden.
    """

    masking: Masking
    slice_size: int

    def grid(self, grid: Grid) -> Grid:
        return grid

    def views(self, text: Text, stream: int, step: int) -> Views:
        if text.grid.block_size is not None:
            return Elbo(self.masking).views(text, stream, step)
        slices = (text.positions - text.prompt_length) // self.slice_size
        learned, masks = text.positions < text.until, []
        for hidden, weight in self.masking.masks(text, slices, stream, step):
            for one in range(int(slices[learned].max(initial=-1)) + 1):
                mine = hidden & (slices == one)
                masks.append(Mask(mine | (slices > one), mine & learned, weight))
        return views_of(text.prompt_length, text.length, text.grid, masks)


@dataclass(frozen=True, slots=True)
class TraceSteps:
    """The states of a step map. Pad tokens that fill the last block, and of which the map says nothing, are decided
    after all others.
    """

    shrinkage: int

    def grid(self, grid: Grid) -> Grid:
        return grid

    def views(self, text: Text, stream: int, step: int) -> Views:
        return trace_views(trace_of(text), text.grid, self.shrinkage)


@dataclass(frozen=True, slots=True)
class Autoregressive:
    """Each token behind the finished text before it, whatever the model's blocks: the text is read causally."""

    def grid(self, grid: Grid) -> Grid:
        return Grid(1)

    def views(self, text: Text, stream: int, step: int) -> Views:
        return causal_views(max(text.prompt_length, 1), text.written)  # nothing stands before the first token


def trace_of(text: Text) -> Trace:
    """The text and its step map as a trace. Pad tokens that are learned belong to its response.

    Raises:
        ValueError: the sample has no step map.
    """
    sample, prompt = text.sample, text.prompt_length
    if sample.step_map is None:
        raise ValueError(f"sample {sample.key} has no step map (sft/check.py)")
    steps = np.array(sample.step_map, dtype=np.int64)
    tokens, missing = text.tokens.copy(), len(text.tokens) - text.written
    known = min(len(sample.tail_ids), missing)
    tail_steps = np.full(missing, max(steps.max(initial=0), max(sample.tail_steps[:known], default=0)) + 1)
    tail_steps[:known] = sample.tail_steps[:known]
    filled_by_us = list(sample.tail_ids[:known]) == tokens[text.written : text.written + known].tolist()
    tokens[text.written : text.written + known] = sample.tail_ids[:known]
    end = text.until if filled_by_us else text.written  # what a rollout left behind its stop token is not learned
    steps = np.concatenate([steps, tail_steps])
    nothing, canvas = np.zeros(end - prompt), text.length - prompt
    return Trace(
        prompt_ids=tokens[:prompt],
        response_ids=tokens[prompt:end],
        tail_ids=tokens[end:],
        steps=steps[: end - prompt],
        tail_steps=steps[end - prompt :],
        logprobs=nothing,
        sampling_logprobs=nothing,
        weight_versions=nothing.astype(np.int64),
        sampling=SamplingParams(max_new_tokens=canvas, block_size=text.grid.block_size or canvas),
        prompt_key="",
        sample=0,
        finish_reason="",
        num_forwards=0,
    )


def open_objective(config: SFTObjectiveConfig) -> Objective:
    """The objective that the settings describe."""
    config = with_objective(config)
    if config.sft_objective == "ar":
        return Autoregressive()
    if config.sft_objective == "trace":
        return TraceSteps(config.shrinkage)
    schedule = MaskSchedule(
        config.mask_ratio_per,
        config.min_mask_ratio,
        config.max_loss_weight,
        config.max_mask_ratio,
        config.mask_at_least_one,
    )
    masking = Masking(schedule, config.mask_draws, config.complementary_masks, config.mask_ratio_warmup_iters)
    return SemiAR(masking, config.slice_size) if config.sft_objective == "semi_ar" else Elbo(masking)


def item_of(group: str, text: Text, views: Views) -> Item:
    """A text and its views as it stands in rows."""
    return Item(group, text.tokens, text.prompt_length, views, text.grid)
