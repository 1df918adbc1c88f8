"""The best layout of a TraceRL step: every legal layout is costed by `megatron_dlm.planning`, and those that do not fit
a device's memory are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.planning.cost import Phase, StepCost, refit_cost, training_phases
from megatron_dlm.planning.decode import rollout_cost, room_for
from megatron_dlm.planning.fit import cache_room
from megatron_dlm.planning.hardware import Hardware
from megatron_dlm.planning.layout import Layout, Workload

BUDGETS = (16384, 32768, 65536, 131072)  # tokens of a row
SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Best:
    """The layout that takes least, its rows, and what it takes."""

    layout: Layout
    workload: Workload
    cost: StepCost


class Search:
    """Costs of one model on one kind of device. What layouts have in common is computed once."""

    def __init__(self, model: ModelConfig, hardware: Hardware) -> None:
        self.model, self.hardware = model, hardware
        self._rollouts: dict[tuple, Phase] = {}

    def best(self, world: int, workload: Workload) -> Best | None:
        """None where nothing fits."""
        trained = []
        for number, (layout, work) in enumerate(self._candidates(world, workload)):
            try:
                phases = dict(training_phases(self.model, layout, work, self.hardware))
            except ConfigError:  # rows that do not hold a response, sizes that do not divide
                continue
            trained.append((sum(phase.seconds for phase in phases.values()), number, layout, work, phases))
        found = None
        for seconds, _, layout, work, phases in sorted(trained, key=lambda one: one[:2]):
            if found is not None and seconds >= found.cost.seconds:
                break  # no engine makes up for that
            for engine in (size for size in SIZES if not world % size and not self.model.num_query_groups % size):
                whole = dataclasses.replace(layout, rollout_tp=engine)
                room = cache_room(self.model, whole, work, self.hardware)
                if room is None:
                    continue
                rollout = self._rollout(whole, workload, room)
                refit = refit_cost(self.model, whole, work, self.hardware)
                cost = StepCost({"rollout": rollout, **phases, "refit": refit}, work.tokens_generated)
                if found is None or cost.seconds < found.cost.seconds:
                    found = Best(whole, work, cost)
        return found

    def _candidates(self, world: int, workload: Workload) -> Iterator[tuple[Layout, Workload]]:
        experts = (1, 8) if self.model.num_experts else (1,)
        budgets = [size for size in BUDGETS if size > workload.prompt_length + 1.2 * max(workload.responses)][:2]
        for tp, pp, cp, ep, recompute, budget in itertools.product(
            SIZES, (1, 2, 4), SIZES, experts, ("none", "full"), budgets
        ):
            if world % (tp * pp * cp) or self.model.num_query_groups % tp:
                continue
            vpp = 1 if pp == 1 or self.model.num_layers % (3 * pp) else 3
            layout = Layout(
                world=world, tp=tp, pp=pp, cp=cp, ep=ep, etp=1 if self.model.num_experts else None, vpp=vpp,
                sequence_parallel=tp > 1, recompute=recompute,
            )  # fmt: skip
            yield layout, dataclasses.replace(workload, row_budget=budget)

    def _rollout(self, layout: Layout, workload: Workload, room: float) -> Phase:
        running = room_for(layout, workload, self.model, room)
        running -= running % 8 if running > 16 else 0  # so that few cases occur
        key = (layout.engine_tp, layout.world, workload, running)
        if key not in self._rollouts:
            work = dataclasses.replace(workload, max_running=running)
            self._rollouts[key] = rollout_cost(self.model, layout, work, self.hardware)
        return self._rollouts[key]
