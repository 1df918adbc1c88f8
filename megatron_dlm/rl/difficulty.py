"""Prompts by how hard they are: those that the policy solves about half of the time teach most.

A group's rewards differ most when half of its responses are right: their variance is p (1 - p). A prompt is drawn with
weight

    floor + 4 p (1 - p)          p: its running pass rate (rl/pass_rates.py); one half before it was ever seen

without replacement within a step; the floor brings solved and unsolved ones back now and then, so that their rates do
not grow old. So a prompt that was never seen is as welcome as the best that is known: new ones come before those that
proved too hard or too easy, and what teaches most need not wait until all others were tried.

Weighted draws are a race: each prompt arrives after an exponential time that is divided by its weight, and the first
ones are taken (Efraimidis and Spirakis, 2006). A prompt's time is keyed by (seed, its key, step), so it does not matter
in which order prompts are listed, how many others there are, or in how many portions a step takes its own.

Invariants (tests/rl/test_difficulty.py):
  - an offer is a function of prompts, rates, seed, step and what is at work;
  - it holds no prompt twice, and none that is at work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.data.mixture import Mixture, Sampler
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.sampler import EpochSampler, Position
from megatron_dlm.diffusion.keys import stream, uniforms
from megatron_dlm.rl.pass_rates import PassRates

UNSEEN = 0.5  # taken for the pass rate of a prompt that was never seen


def weights_of(rates: np.ndarray, floor: float) -> np.ndarray:
    """Weights of prompts with these pass rates."""
    rates = np.clip(rates, 0.0, 1.0)
    return floor + 4 * rates * (1 - rates)


class DifficultySampler:
    """Offers prompts of one source; a `Sampler`. It has no progress of its own: what it goes by are the rates.

    Args:
        prompts: no two with the same key.
        rates: of the run; they change between steps.
        floor: lowest weight.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, rates: PassRates, floor: float) -> None:
        self._prompts = sorted(prompts, key=lambda prompt: prompt.key)
        keys = [prompt.key for prompt in self._prompts]
        self._place = {key: place for place, key in enumerate(keys)}
        self._streams = torch.tensor([stream(seed, "difficulty", key) for key in keys])
        self._rates, self._rows, self._floor = rates, rates.rows(keys), floor

    def offer(self, count: int, step: int, at_work: Collection[str]) -> list[Prompt]:
        """`count` prompts that are not at work, or as many as there are."""
        seen = self._rates.visits[self._rows] > 0
        weight = weights_of(np.where(seen, self._rates.rates[self._rows], UNSEEN), self._floor)
        time = -np.log1p(-uniforms(self._streams, torch.tensor(step)).numpy())
        last = weight == 0  # those that only the lack of others brings back
        order = np.lexsort((time / np.where(last, 1.0, weight), last))
        busy = np.zeros(len(order), bool)
        busy[[self._place[key] for key in at_work if key in self._place]] = True
        return [self._prompts[place] for place in order[~busy[order]][:count]]

    def progress(self) -> dict[str, Any]:
        return {}


def open_sampler(
    prompts: Sequence[Prompt],
    stage: str,
    seed: int,
    curriculum: CurriculumConfig,
    rates: PassRates | None,
    saved: Mapping[str, Any],
) -> Sampler[Prompt]:
    """The sampler of a run.

    Args:
        prompts: in the order of their sources; each source has some where there are weights (`mixture.check_mixture`).
        rates: where prompts are drawn by difficulty.
        saved: the progress of the run that is resumed, or an empty mapping.
    """

    def one(items: Sequence[Prompt], place: Mapping[str, Any]) -> Sampler[Prompt]:
        if rates is not None:
            return DifficultySampler(items, seed, rates, curriculum.difficulty_floor)
        return EpochSampler(items, seed, Position.read(stage, place.get("position")))

    if not curriculum.prompt_weights:
        return one(prompts, saved)
    sources: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        sources.setdefault(prompt.source, []).append(prompt)
    return Mixture(sources, dict(zip(sources, curriculum.prompt_weights, strict=True)), one, saved)
