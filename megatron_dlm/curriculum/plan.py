"""From a recipe to the stages that run: grown ones written out, settings merged, every name resolved.

A stage's settings are, where they speak of the same key, its own before those of `grow`, before those that it takes
over, before the defaults. It takes over the section `model` of the stage whose weights it starts from, for a model of
blocks of 16 stays one. Of the defaults it takes what its command reads.

Invariants (tests/curriculum/test_plan.py):
  - settings that no command reads, or not this one, are refused, and so are names of stages that are not there;
  - whatever gates say, a run of the plan ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import one_of, suggest
from megatron_dlm.config.flags import parse_content
from megatron_dlm.curriculum.recipe import Gate, Reach, Recipe, Written

_WEIGHTS = ("load", "hf_checkpoint", "ckpt_step")
_OURS = {
    "checkpoint": {
        "save": "A stage is kept in a folder of its own name below that of the run. Leave it out.",
        "finetune": "Every stage begins with fresh steps and optimizer. Leave it out.",
    },
    "logging": {"metrics_jsonl": "The metrics of a stage are kept in its folder. Leave it out."},
    "run": {
        "exit_metric": "Write until: {metric: ..., at_least: ...} in the stage.",
        "exit_metric_at_least": "Write until: {metric: ..., at_least: ...} in the stage.",
        "dry_run": "Give curriculum the flag --dry-run instead.",
        "dry_run_world_size": "Give curriculum the flag --dry-run-world-size instead.",
    },
}
"""Settings of the commands that a curriculum gives them itself: section -> key -> what to do."""
_MAY_CHANGE = {
    "parallel": None,
    "logging": None,
    "checkpoint": ("save_interval", "keep_last_n"),
    "run": ("exit_interval", "exit_duration_in_mins"),
}
"""What is no part of a stage's identity: whole sections, or keys of them. Results do not depend on it."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a plan has to know of a command.

    Attributes:
        sections: name -> dataclass, as its `parse` takes them.
        trains: whether it has steps, saves, and goes on from what it saved.
        steps: section and key of their number, for one that trains.
        gives_weights: whether later stages can start from its folder.
        reads_weights: whether it takes --load.
        saves_in: the flag that is given a folder below the stage's own, and that folder's name ('': the stage's own).
        complete_at: section and key of a file that is there when the command has done all its work, and not before.
    """

    name: str
    sections: Mapping[str, type]
    trains: bool = False
    steps: tuple[str, str] | None = None
    gives_weights: bool = False
    reads_weights: bool = True
    saves_in: tuple[str, str] | None = None
    complete_at: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage that runs.

    Attributes:
        name: unique; of a grown stage, its name with a number behind it.
        base: the name in the recipe.
        settings: section -> key -> value, without those that say where weights come from and go.
        source: explicit `from`: the name of a stage of the plan; None: the last one that gave weights, if there is one.
        parent: of the plan, in the first pass through it; None where the stage brings weights of its own, or begins
            with none.
        start: flags --load or --hf-checkpoint of its own, where there is no parent; a repetition goes on from what the
            stages before it left.
    """

    name: str
    base: str
    command: Command
    settings: Mapping[str, Mapping[str, Any]]
    source: str | None = None
    parent: str | None = None
    start: tuple[str, ...] = ()
    until: Reach | None = None
    gate: Gate | None = None

    @property
    def last_step(self) -> int | None:
        """Number of steps of a stage that trains; None for others."""
        if self.command.steps is None:
            return None
        section, key = self.command.steps
        given = self.settings.get(section, {}).get(key)
        return _default(self.command.sections[section], key) if given is None else given

    def get(self, section: str, key: str) -> Any:
        """A setting, the default included; None where the command has none of that name."""
        kind = self.command.sections.get(section)
        if kind is None or key not in _keys(kind):
            return None
        return self.settings.get(section, {}).get(key, _default(kind, key))

    def identity(self) -> str:
        """16 hex digits that change when the stage becomes another one."""
        settings = {}
        for section, keys in self.settings.items():
            free = _MAY_CHANGE.get(section, ())
            kept = {} if free is None else {key: value for key, value in keys.items() if key not in free}
            if kept:
                settings[section] = kept
        until = None if self.until is None else dataclasses.astuple(self.until)
        whole = [self.command.name, settings, self.source, list(self.start), until]
        text = json.dumps(whole, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages in their order. Attributes: path: of the recipe. save: folder of the run."""

    path: str
    save: str
    stages: Sequence[Stage]

    def index(self, name: str) -> int:
        """Of a stage of this name; of a grown one's base name, of its first part. -1: there is none."""
        names = [stage.name for stage in self.stages]
        if name in names:
            return names.index(name)
        return next((place for place, stage in enumerate(self.stages) if stage.base == name), -1)


def make_plan(recipe: Recipe, commands: Mapping[str, Command]) -> Plan:
    """Write out a recipe.

    Args:
        commands: those that a stage can be, by name.

    Raises:
        ConfigError: something in it is unknown, or cannot be.
    """
    _check_defaults(recipe, commands)
    stages: list[Stage] = []
    for written in recipe.stages:
        command = _command(written, recipe, commands)
        parts = _grown(written, recipe)
        for number, sections in enumerate(parts, start=1):
            name = f"{written.name}-{number}" if written.grow else written.name
            last = number == len(parts)
            stages.append(_stage(written, name, command, sections, stages, recipe, number == 1, last))
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1 or any(name == other.name and other.grow for other in recipe.stages):
            raise ConfigError(
                f"{recipe.path} has two stages of the name {name}, one of them grown. Give the other another name."
            )
    plan = Plan(recipe.path, recipe.save, stages)
    for place, stage in enumerate(stages):
        _check_gate(plan, place, stage)
    return plan


def _stage(
    written: Written,
    name: str,
    command: Command,
    sections: Mapping[str, Mapping[str, Any]],
    before: Sequence[Stage],
    recipe: Recipe,
    first: bool,
    last: bool,
) -> Stage:
    where = f"stage {name} of {recipe.path}"
    own = sections.get("checkpoint", {})
    given = {key: own[key] for key in _WEIGHTS if own.get(key) is not None}
    parent = _parent(written, before, where) if first else before[-1]
    if given and written.source is not None:
        raise ConfigError(f"The {where} has weights of its own and takes those of {written.source}. Leave one out.")
    if (given and first) or not command.reads_weights:
        parent = None
    settings = _merged(command, recipe.defaults, parent, sections)
    start: tuple[str, ...] = ()
    if parent is None and command.reads_weights:
        if not given:
            taken = recipe.defaults.get("checkpoint", {})
            given = {key: taken[key] for key in _WEIGHTS if taken.get(key) is not None}
        start = _start(given, command, where)
        if not start and not command.trains:
            raise ConfigError(
                f"The {where} has no weights. Write checkpoint: {{load: FOLDER}}, or put it behind another."
            )
    _check_own(written, recipe)
    until = written.until
    if until is not None and not command.trains:
        raise ConfigError(f"until in {where} waits for a metric, and {command.name} takes no steps. Leave it out.")
    if written.gate is not None and command.name != "evaluate":
        raise ConfigError(f"The {where} has a gate, and is {command.name}. Put the gate into a stage that evaluates.")
    source = written.source if first else before[-1].name
    if first and source is not None:
        source = parent.name
    stage = Stage(
        name,
        written.name,
        command,
        settings,
        source if command.reads_weights else None,
        parent.name if parent is not None else None,
        start,
        until,
        written.gate if last else None,
    )
    parse_content(command.name, command.sections, settings, where)  # what it does not have, or of another type
    return stage


def _merged(
    command: Command,
    defaults: Mapping[str, Mapping[str, Any]],
    parent: Stage | None,
    own: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for section, kind in command.sections.items():
        known = _keys(kind)
        keys = {key: value for key, value in defaults.get(section, {}).items() if key in known}
        if section == "model" and parent is not None:
            keys |= parent.settings.get("model", {})
        settings[section] = keys | dict(own.get(section, {}))
    for section in own.keys() - settings.keys():
        settings[section] = dict(own[section])  # which the command refuses
    checkpoint = settings.get("checkpoint", {})
    for key in _WEIGHTS:
        checkpoint.pop(key, None)
    return {section: keys for section, keys in settings.items() if keys or section not in command.sections}


def _start(given: Mapping[str, Any], command: Command, where: str) -> tuple[str, ...]:
    if "load" in given and "hf_checkpoint" in given:
        raise ConfigError(f"The {where} has both load and hf_checkpoint. Leave one of the two out.")
    if "load" in given:
        step = [] if "ckpt_step" not in given else ["--ckpt-step", str(given["ckpt_step"])]
        return ("--load", str(given["load"]), *step, *(["--finetune"] if command.trains else []))
    return ("--hf-checkpoint", str(given["hf_checkpoint"])) if "hf_checkpoint" in given else ()


def _parent(written: Written, before: Sequence[Stage], where: str) -> Stage | None:
    givers = [stage for stage in before if stage.command.gives_weights]
    if written.source is None:
        return givers[-1] if givers else None
    found = [stage for stage in givers if written.source in (stage.name, stage.base)]
    if found:
        return found[-1]
    if any(written.source in (stage.name, stage.base) for stage in before):
        raise ConfigError(f"from in {where} is {written.source}, which leaves no weights. Name a stage that trains.")
    names = [stage.base for stage in givers]
    hint = suggest(written.source, names, f"Use {one_of(dict.fromkeys(names))}." if names else "Leave it out.")
    raise ConfigError(f"from in {where} is {written.source}, which is no stage before it. {hint}")


def _grown(written: Written, recipe: Recipe) -> list[dict[str, dict[str, Any]]]:
    """The sections of each part of a stage."""
    own = {section: dict(keys) for section, keys in written.sections.items()}
    if not written.grow:
        return [own]
    for setting in written.grow:
        section, key = setting.split(".")
        if key in own.get(section, {}):
            raise ConfigError(
                f"Stage {written.name} of {recipe.path} sets {setting} and lets it grow. Leave one of the two out."
            )
    parts = []
    for place in range(len(next(iter(written.grow.values())))):
        part = {section: dict(keys) for section, keys in own.items()}
        for setting, values in written.grow.items():
            section, key = setting.split(".")
            part.setdefault(section, {})[key] = values[place]
        parts.append(part)
    return parts


def _command(written: Written, recipe: Recipe, commands: Mapping[str, Command]) -> Command:
    if written.command not in commands:
        hint = suggest(written.command, commands, f"Use {one_of(commands)}.")
        raise ConfigError(f"Stage {written.name} of {recipe.path} cannot be {written.command}. {hint}")
    return commands[written.command]


def _check_defaults(recipe: Recipe, commands: Mapping[str, Command]) -> None:
    """Refuse defaults that no stage reads: they are misspelt, or left over."""
    used = [commands[stage.command] for stage in recipe.stages if stage.command in commands]
    for section, keys in recipe.defaults.items():
        kinds = [command.sections[section] for command in used if section in command.sections]
        if not kinds:
            known = {name for command in used for name in command.sections}
            hint = suggest(section, sorted(known), "Take it out.")
            raise ConfigError(f"No stage of {recipe.path} reads the section {section} of its defaults. {hint}")
        known = {key for kind in kinds for key in _keys(kind)}
        for key in keys:
            if key not in known:
                hint = suggest(str(key), sorted(known), f"Use one of {', '.join(sorted(known))}.")
                raise ConfigError(f"The section {section} of the defaults in {recipe.path} has no key {key}. {hint}")
            _check_ours(section, key, f"defaults in {recipe.path}")


def _check_own(written: Written, recipe: Recipe) -> None:
    for section, keys in written.sections.items():
        for key in keys:
            _check_ours(section, key, f"stage {written.name} of {recipe.path}")


def _check_ours(section: str, key: str, where: str) -> None:
    if key in _OURS.get(section, {}):
        told = _OURS[section][key]
        raise ConfigError(f"{section}.{key} stands in the {where}, and a curriculum gives it itself. {told}")


def _check_gate(plan: Plan, place: int, stage: Stage) -> None:
    if stage.gate is None or stage.gate.repeat is None:
        return
    name, where = stage.gate.repeat, f"The gate of stage {stage.name} of {plan.path}"
    target = plan.index(name)
    if target < 0 or target >= place:
        names = list(dict.fromkeys(other.base for other in plan.stages[:place]))
        hint = suggest(name, names, f"Use {one_of(names)}." if names else "Leave it out.")
        raise ConfigError(f"{where} repeats {name}, which is no stage before it. {hint}")
    again = plan.stages[target : place + 1]
    trained = [other for other in again if other.command.trains]
    if not trained:
        raise ConfigError(f"{where} repeats {name}, and nothing is trained from there on. Name a stage that trains.")
    first, within = trained[0], {other.name for other in again}
    if first.source is not None and first.source not in within:
        raise ConfigError(
            f"{where} repeats {first.name}, which always starts from the same weights. Leave its from out, so that it "
            "goes on from its own."
        )


def _keys(kind: type) -> set[str]:
    return {item.name for item in dataclasses.fields(kind)}


def _default(kind: type, key: str) -> Any:
    (item,) = [item for item in dataclasses.fields(kind) if item.name == key]
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
