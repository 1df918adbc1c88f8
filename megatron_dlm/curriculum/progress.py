"""What comes next, from what is done: a pure function of the plan and of the record of finished stages.

A run is a list of visits to stages. A gate may send it back, so a stage can be visited several times, in rounds; each
visit has a folder of its own. Nothing but the list of finished visits with their metrics is remembered: gates, rounds
and weights follow from it, in the process that ran them and in one that is started days later.

Invariants (tests/curriculum/test_progress.py):
  - `following` never refuses what it has itself proposed and the plan still says;
  - a run ends after at most as many visits as its gates allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.curriculum.plan import Plan, Stage
from megatron_dlm.curriculum.recipe import CONTINUE, Gate


@dataclass(frozen=True, slots=True)
class Done:
    """A finished visit.

    Attributes:
        identity: of the stage as it was then (`Stage.identity`).
        step: last one of a stage that trains.
        metrics: of the last step, or of the evaluation.
    """

    stage: str
    round: int
    identity: str
    step: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def folder(self) -> str:
        return folder_of(self.stage, self.round)


@dataclass(frozen=True, slots=True)
class Visit:
    """What is to be done.

    Attributes:
        source: name of the folder, below the run's, whose weights it starts from; None: the stage's own start.
        rates: likewise of the run whose pass rates of prompts it goes on with.
        value: likewise of the run whose value model it goes on with.
    """

    stage: Stage
    round: int
    source: str | None
    rates: str | None = None
    value: str | None = None

    @property
    def folder(self) -> str:
        return folder_of(self.stage.name, self.round)


@dataclass(frozen=True, slots=True)
class End:
    """Nothing is to be done. Attributes: problem: the gate that was not passed, in a sentence; None: all is well."""

    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What a gate said. Attributes: went: on, back or stop."""

    stage: str
    round: int
    gate: Gate
    value: Any
    went: str

    def told(self) -> str:
        reach = self.gate.reach
        shown = f"{self.value:.4g}" if isinstance(self.value, (int, float)) else "not recorded"
        passed = reach.met({reach.metric: self.value})
        words = {"on": "goes on all the same", "back": f"goes back to {self.gate.repeat}", "stop": "stops here"}
        end = "is passed" if passed else f"is not passed, and the run {words[self.went]}"
        return f"The gate of {self.stage} ({reach.metric} {shown}, at least {reach.at_least:g}) {end}."


def folder_of(stage: str, round: int) -> str:
    return stage if round == 1 else f"{stage}@{round}"


def following(plan: Plan, done: Sequence[Done]) -> tuple[Visit | End, list[Judged]]:
    """What comes after these visits, and what the gates on the way said.

    Raises:
        ConfigError: the plan is not the one by which they were made.
    """
    place, rounds, sent_back, judged = 0, Counter(), Counter(), []
    for number, visit in enumerate(done, start=1):
        if place >= len(plan.stages) or plan.stages[place].name != visit.stage:
            there = "nothing" if place >= len(plan.stages) else plan.stages[place].name
            raise ConfigError(
                f"{plan.path} has {there} where this run did {visit.stage} (its stage {number}). Give the recipe of "
                "the run, or --redo-from with the first stage that is to be another."
            )
        stage = plan.stages[place]
        if stage.identity() != visit.identity:
            raise ConfigError(
                f"Stage {stage.name} of {plan.path} is another one than the stage of that name that this run has done. "
                f"Give the recipe of the run, or --redo-from {stage.name} to do it again, and all that came after it."
            )
        rounds[stage.name] += 1
        place += 1
        gate = stage.gate
        if gate is None:
            continue
        went = _way(gate, visit.metrics, sent_back[stage.name])
        judged.append(Judged(stage.name, visit.round, gate, visit.metrics.get(gate.reach.metric), went))
        if went == "back":
            sent_back[stage.name] += 1
            place = plan.index(gate.repeat)
        elif went == "stop":
            if number == len(done):
                return End(_problem(plan, judged[-1], sent_back[stage.name])), judged
            raise ConfigError(
                f"The gate of {stage.name} in {plan.path} stops a run that went on behind it. Give the recipe of the "
                f"run, or --redo-from the stage after it."
            )
    if place >= len(plan.stages):
        return End(), judged
    return _visit(plan.stages[place], rounds, done, plan), judged


def _visit(stage: Stage, rounds: Counter, done: Sequence[Done], plan: Plan) -> Visit:
    round, source = rounds[stage.name] + 1, None
    stages = {one.name: one for one in plan.stages}
    givers = [one for one in done if stages[one.stage].command.gives_weights]
    if stage.command.reads_weights:
        if stage.source is not None:
            source = [one for one in givers if one.stage == stage.source][-1].folder
        elif givers and (stage.parent is not None or round > 1):
            source = givers[-1].folder
    rates = value = None
    if stage.get("curriculum", "prompt_sampling") == "difficulty" and stage.get("curriculum", "pass_rates") is None:
        rates = _latest(done, stages, lambda one: one.get("curriculum", "prompt_sampling") == "difficulty")
    if stage.get("value", "use_value_model") and stage.get("value", "value_load") is None:
        value = _latest(done, stages, lambda one: one.get("value", "use_value_model"))
    return Visit(stage, round, source, rates, value)


def _latest(done: Sequence[Done], stages: Mapping[str, Stage], which) -> str | None:
    found = [one.folder for one in done if stages[one.stage].command.trains and which(stages[one.stage])]
    return found[-1] if found else None


def _way(gate: Gate, metrics: Mapping[str, Any], before: int) -> str:
    if gate.reach.met(metrics) or (gate.repeat is None and gate.otherwise == CONTINUE):
        return "on"
    return "back" if gate.repeat is not None and before < gate.at_most else "stop"


def _problem(plan: Plan, judged: Judged, repeats: int) -> str:
    reach = judged.gate.reach
    value = f"{judged.value:.4g}" if isinstance(judged.value, (int, float)) else "not recorded"
    again = f" after {repeats} repetition{'s' if repeats > 1 else ''}" if repeats else ""
    return (
        f"The gate of stage {judged.stage} is not passed{again}: {reach.metric} is {value}, and {plan.path} asks for "
        f"at least {reach.at_least:g}. Lower it or raise at_most there to go on, or change stages and use --redo-from."
    )
