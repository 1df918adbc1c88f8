"""What a curriculum's YAML says, read and checked as far as that is possible without knowing any command.

    save: runs/long_cot
    defaults:                       # sections, as in every configuration
      model: {model_preset: sdar-8b}
    stages:
      - name: rl
        command: tracerl
        from: warm                  # a stage; the last one before that has weights, where it is not given
        rl: {prompt_data: [train.jsonl]}
        grow: {rollout.rollout_max_response_len: [2048, 8192], rl.num_rollout: [20, 40]}
        until: {metric: eval/dynamic/accuracy, at_least: 0.6}
      - name: check
        command: evaluate
        gate: {metric: eval/dynamic/accuracy, at_least: 0.6, otherwise: {repeat: rl, at_most: 2}}

Whatever stands beside the keys of a stage (`KEYS`) is a section of its command; the plan looks at those (plan.py).

Invariants (tests/curriculum/test_recipe.py): every mistake is one ConfigError that names the stage and the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dlm.config import yaml_file
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import one_of, suggest

KEYS = ("name", "command", "from", "grow", "until", "gate")
TOP = ("save", "defaults", "stages")
STOP, CONTINUE = "stop", "continue"
RESERVED = ("defaults", "save", "stages", "discarded")  # of the YAML, and of the run's folder
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Reach:
    """A metric and the value from which on it is enough."""

    metric: str
    at_least: float

    def met(self, metrics: Mapping[str, Any]) -> bool:
        """Whether it is, by a record of metrics."""
        value = metrics.get(self.metric)
        return isinstance(value, (int, float)) and value >= self.at_least


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a run may go on behind an evaluation.

    Attributes:
        repeat: the stage from which on everything is done again where the metric is not reached; None: `otherwise`
            (stop or continue) says what happens.
        at_most: how many times; then the run stops.
    """

    reach: Reach
    otherwise: str = STOP
    repeat: str | None = None
    at_most: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """A stage as it was written down.

    Attributes:
        sections: name -> its keys, unchecked.
        grow: "section.key" -> the values that it takes one after the other; all lists of one length.
    """

    name: str
    command: str
    source: str | None = None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grow: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    until: Reach | None = None
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A curriculum as it was written down. Attributes: path: of its file. save: folder of the whole run."""

    path: str
    save: str
    defaults: Mapping[str, Mapping[str, Any]]
    stages: Sequence[Written]


def read_recipe(path: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a curriculum.

    Args:
        changes: NAME.SECTION.KEY=VALUE, as in --set: what a stage (or `defaults`) says instead; save=FOLDER.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    return recipe_of(yaml_file.load(path), path, changes)


def recipe_of(content: Mapping[str, Any], path: str, changes: Sequence[str] = ()) -> Recipe:
    """The same of what was read from a file already."""
    content = dict(content)
    _only(content, TOP, path)
    if not isinstance(content.get("stages"), list) or not content["stages"]:
        raise ConfigError(f"{path} lists no stages. Write stages: and below it a list of them, each with a command.")
    content["stages"] = [
        _mapping(stage, f"entry {place} of stages in {path}") for place, stage in enumerate(content["stages"], start=1)
    ]
    content["defaults"] = _sections(content.get("defaults") or {}, f"defaults in {path}")
    for change in changes:
        _change(content, change, path)
    save = content.get("save")
    if not isinstance(save, str) or not save.strip():
        raise ConfigError(f"{path} does not say where its run is kept. Write save: and a folder at its top.")
    stages = [_stage(stage, place, path) for place, stage in enumerate(content["stages"], start=1)]
    names = [stage.name for stage in stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path} has two stages of the name {twice}. Give each a name of its own.")
    return Recipe(path, save, content["defaults"], stages)


def _stage(content: dict[str, Any], place: int, path: str) -> Written:
    name, command = content.get("name"), content.get("command")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"Stage {place} of {path} has the name {name!r}. Give it one of letters, digits, '_', '-' and '.'."
        )
    if name in RESERVED:
        raise ConfigError(f"A stage of {path} is named {name}, which means something else. Give it another name.")
    where = f"stage {name} of {path}"
    if not isinstance(command, str):
        raise ConfigError(f"The {where} has no command. Write command: sft, say.")
    source = content.get("from")
    if source is not None and not isinstance(source, str):
        raise ConfigError(f"from in {where} is {source!r}. Give the name of an earlier stage.")
    sections = {key: value for key, value in content.items() if key not in KEYS}
    until = (
        None
        if content.get("until") is None
        else _reach(_mapping(content["until"], f"until in {where}"), f"until in {where}")
    )
    gate = None if content.get("gate") is None else _gate(content["gate"], f"gate in {where}")
    return Written(name, command, source, _sections(sections, where), _grow(content.get("grow"), where), until, gate)


def _grow(given: Any, where: str) -> dict[str, list[Any]]:
    if given is None:
        return {}
    grow = _mapping(given, f"grow in {where}")
    for setting, values in grow.items():
        if not isinstance(setting, str) or setting.count(".") != 1:
            raise ConfigError(
                f"grow in {where} names {setting!r}. Write SECTION.KEY, such as rollout.rollout_max_response_len."
            )
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grow in {where} gives {setting} no list of values. Write them in brackets: [a, b].")
    lengths = {setting: len(values) for setting, values in grow.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{setting} has {length}" for setting, length in lengths.items())
        raise ConfigError(f"The lists of grow in {where} differ in length ({told}). Give each as many values.")
    return grow


def _reach(content: dict[str, Any], where: str, also: Sequence[str] = ()) -> Reach:
    _only(content, ("metric", "at_least", *also), where)
    metric, bound = content.get("metric"), content.get("at_least")
    if not isinstance(metric, str) or not metric.strip():
        raise ConfigError(f"{where} names no metric. Write metric: eval/dynamic/accuracy, say.")
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
        raise ConfigError(f"at_least of {where} is {bound!r}. Give a number.")
    return Reach(metric, float(bound))


def _gate(given: Any, where: str) -> Gate:
    content = _mapping(given, where)
    reach, otherwise = _reach(content, where, ("otherwise",)), content.get("otherwise", STOP)
    if otherwise in (STOP, CONTINUE):
        return Gate(reach, otherwise)
    if not isinstance(otherwise, dict):
        raise ConfigError(
            f"otherwise of {where} is {otherwise!r}. Write {STOP}, {CONTINUE} or {{repeat: STAGE, at_most: 2}}."
        )
    _only(otherwise, ("repeat", "at_most"), f"otherwise of {where}")
    repeat, at_most = otherwise.get("repeat"), otherwise.get("at_most")
    if not isinstance(repeat, str):
        raise ConfigError(f"otherwise of {where} repeats {repeat!r}. Give the name of an earlier stage.")
    if type(at_most) is not int or at_most < 1:
        raise ConfigError(
            f"{where} repeats {repeat} without a limit (at_most is {at_most!r}). Give at_most: the number of times."
        )
    return Gate(reach, STOP, repeat, at_most)


def _change(content: dict[str, Any], change: str, path: str) -> None:
    """One of --set, into the content of the file."""
    key, equals, text = change.partition("=")
    value = yaml_file.parse_value(text, f"--set {change}")
    if equals and key == "save":
        content["save"] = value
        return
    owner, _, setting = key.partition(".")  # a stage's own name may hold dots: the longest that fits
    owners = {"defaults": content["defaults"], **{stage.get("name"): stage for stage in content["stages"]}}
    fits = [name for name in owners if isinstance(name, str) and key.startswith(name + ".")]
    if fits:
        owner = max(fits, key=len)
        setting = key.removeprefix(owner + ".")
    if not equals or not setting:
        raise ConfigError(f"--set {change} is no change. Write STAGE.SECTION.KEY=VALUE, or save=FOLDER.")
    if owner not in owners:
        hint = suggest(owner, [str(name) for name in owners], f"Use {one_of(owners)}.")
        raise ConfigError(f"--set {change} names {owner}, which is no stage of {path}. {hint}")
    target = owners[owner]
    *way, last = [setting] if setting in KEYS else setting.split(".")
    if way[:1] == ["grow"]:
        way, last = ["grow"], setting.removeprefix("grow.")
    elif len(way) > 1 or (not way and last not in KEYS):
        raise ConfigError(f"--set {change} names no setting. Write STAGE.SECTION.KEY=VALUE.")
    for name in way:
        if target.get(name) is None:
            target[name] = {}
        target = _mapping(target[name], f"{name} in {path}", keep=True)
    target[last] = value


def _sections(content: Any, where: str) -> dict[str, dict[str, Any]]:
    found = _mapping(content, where)
    return {str(name): {} if keys is None else _mapping(keys, f"{name} in {where}") for name, keys in found.items()}


def _mapping(content: Any, where: str, keep: bool = False) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is {content!r}, not keys with values. Write its keys below it, indented.")
    return content if keep else dict(content)


def _only(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(f"{where} has no key {key}. {suggest(str(key), known, f'Use {one_of(known)}.')}")
