"""Updates as the trainer makes them, from traces that nobody had to generate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_dlm.config.objective import with_method
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.diffusion.planner import Load
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.views import split_views
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.methods import TARGET, States, counts_of
from megatron_dlm.rl.update import UpdateSettings, update_settings
from tests.diffusion.oracles import random_group
from tests.rl.records import record_of

TEMPERATURE, LONGEST, SEED, STEP = 0.8, 12, 5, 3


def responses(groups: int = 3, block: int = 4, **canvas: object) -> list[Trace]:
    """Groups of three, with prompts of 3, 4, ... tokens. `canvas`: as `random_group`."""
    rng = np.random.default_rng(0)
    return [
        trace
        for n in range(groups)
        for trace in random_group(3 + n, [2 + n, 7, 5 - n % 3], block, rng, f"p{n}", **canvas)
    ]


def advantage_of(trace: Trace) -> float:
    return math.cos(5.0 * len(trace.prompt_ids) + 3 * trace.sample)


def advantages_of(traces: Sequence[Trace]) -> dict[tuple[str, int], float]:
    return {(trace.prompt_key, trace.sample): advantage_of(trace) for trace in traces}


def settings_of(
    config: RLConfig, block: int | None, budget: int, updates: int = 1, **changes: object
) -> UpdateSettings:
    """Args: block: of the policy's attention. budget: tokens of a row. updates: in the step."""
    config = with_method(config)
    states = States.of(config, block, SEED)
    settings = dict(num_updates=updates, longest=LONGEST, step=STEP, max_tokens_per_row=budget)
    return dataclasses.replace(update_settings(config, states, TEMPERATURE), **settings | changes)


def records_of(traces: Sequence[Trace], settings: UpdateSettings, owner: int = 0, first: int = 0) -> list[Graded]:
    """Records of the traces that `owner` holds, which lie there from place `first` on."""
    records, unit = [], settings.states.method.unit
    for index, trace in enumerate(traces, first):
        item = settings.states.item(trace, settings.step)
        parts = split_views(item, settings.max_tokens_per_row) if unit == TARGET else []
        loads = tuple(Load(part.group, part.shared_length, part.own_length) for part in parts)
        records.append(record_of(trace, index, item, counts_of(item, unit), owner, parts=loads))
    return records
