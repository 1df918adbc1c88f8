"""Recipes of made-up commands, and stages that only pretend to run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm.config.checkpoint import CheckpointConfig, LoadConfig
from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.log import LoggingConfig, ReportConfig
from megatron_dlm.config.run import RunConfig, TrainingRunConfig
from megatron_dlm.curriculum.plan import Command, Plan, make_plan
from megatron_dlm.curriculum.recipe import recipe_of


@dataclass(slots=True)
class Learning:
    """What a stage learns."""

    steps: int = 4
    """Steps."""
    length: int = 8
    """Tokens."""


@dataclass(slots=True)
class Model:
    """The model."""

    block_size: int = 4
    """Block."""
    width: int = 16
    """Width."""


@dataclass(slots=True)
class Writing:
    """What a stage writes."""

    output: str | None = None
    """File."""


TRAINING = {
    "model": Model,
    "learning": Learning,
    "curriculum": CurriculumConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "run": TrainingRunConfig,
}
READING = {"model": Model, "checkpoint": LoadConfig, "logging": ReportConfig, "run": RunConfig}
COMMANDS = {
    "learn": Command("learn", TRAINING, True, ("learning", "steps"), gives_weights=True),
    "evaluate": Command("evaluate", READING),
    "write": Command("write", READING | {"writing": Writing}, complete_at=("writing", "output")),
    "make": Command("make", {"model": Model}, gives_weights=True, reads_weights=False, saves_in=("--save", "")),
}
GATE = {"metric": "eval/score", "at_least": 0.5}


def plan_of(save: Any, *stages: Mapping[str, Any], **defaults: Any) -> Plan:
    """A plan of COMMANDS; a stage's command is `learn` unless it says so."""
    content = {"save": str(save), "defaults": defaults, "stages": [{"command": "learn", **stage} for stage in stages]}
    return make_plan(recipe_of(content, "c.yaml"), COMMANDS)


@dataclass
class Pretender:
    """Starts stages that do a step each time they are looked at, save every second one, and write what real ones would.

    Attributes:
        scores: metrics of the evaluations to come, in order.
        dies: (folder, step) -> exit code: of steps at which a stage ends, once each.
        log: the command lines of all that were started.
    """

    scores: list[float] = field(default_factory=list)
    dies: dict[tuple[str, int], int] = field(default_factory=dict)
    log: list[list[str]] = field(default_factory=list)

    def __call__(self, words: Sequence[str], environment: Mapping[str, str]) -> Pretended:
        self.log.append(list(words))
        return Pretended(self, list(words))


class Pretended:
    def __init__(self, world: Pretender, words: list[str]) -> None:
        self.world, self.words, self.flags = world, words, dict(zip(words, [*words[1:], ""]))
        self.folder = Path(self.flags["--config"]).parent
        self.trains, self.code = "--save" in self.flags, None
        latest = self.folder / "latest_checkpointed_iteration.txt"
        self.latest = latest
        self.step = int(latest.read_text()) if self.flags.get("--load") == str(self.folder) else 0
        self.last = json.loads((self.folder / "last.json").read_text()) if (self.folder / "last.json").exists() else 4

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        if self.words[0] == "make":
            self.latest.write_text("1")
            self.code = 0
            return self.code
        if self.words[0] == "write":
            output = Path(yaml.safe_load(Path(self.flags["--config"]).read_text())["writing"]["output"])
            self.code = 2 if output.exists() else 0
            output.write_text(self.flags["--load"])
            return self.code
        if not self.trains:
            score = self.world.scores.pop(0)
            self._record({"step": 1, "eval/score": score})
            self.code = 0
            return self.code
        if self.step >= self.last:  # nothing is left to do
            self.code = 0
            return self.code
        self.step += 1
        metrics = {"step": self.step, "train/loss": 1 / self.step, "eval/score": self.step / 10}
        self._record(metrics)
        enough = self.flags.get("--exit-metric")
        ended = self.step >= self.last or (
            enough is not None and metrics.get(enough, -1) >= float(self.flags["--exit-metric-at-least"])
        )
        if ended or self.step % 2 == 0:
            self.latest.write_text(str(self.step))
        self.code = self.world.dies.pop((self.folder.name, self.step), 0 if ended else None)
        return self.code

    def send(self, signum: int) -> None:
        self.latest.write_text(str(self.step))
        self.code = 128 + signum

    def _record(self, record: dict) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
