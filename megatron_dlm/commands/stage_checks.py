"""Every stage of a curriculum, checked before the first one runs: by what its command refuses, as far as that is known
without weights and data.

The checks import what commands import, and may touch a device. They run in a process of their own (`apart`), so that
the one that outlives all stages stays small and holds nothing of a device.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.commands import sft, tracerl
from megatron_dlm.commands.common import quiet_libraries
from megatron_dlm.commands.dry_run import GENERATED, INPUTS
from megatron_dlm.config import errors, yaml_file
from megatron_dlm.config.errors import ConfigError, UserError
from megatron_dlm.config.fields import flag_name, one_of, suggest
from megatron_dlm.config.flags import parse, parse_content
from megatron_dlm.curriculum.command_line import arguments, sections
from megatron_dlm.curriculum.plan import Plan, Stage
from megatron_dlm.curriculum.progress import Visit
from megatron_dlm.curriculum.recipe import Reach

_TRAINING = {"sft": sft.main, "tracerl": tracerl.main}
_RECORDED = {
    "sft": ("train/", "perf/", "memory/"),
    "tracerl": ("train/", "rollout/", "curriculum/", "value/", "perf/", "memory/", "eval/"),
    "evaluate": ("eval/",),
}
"""How names of metrics begin that a command records (docs/metrics.md)."""
_OF_EVALUATION = ("accuracy", "response_len", "tokens_per_step", "tokens_per_forward", "truncated_ratio", "responses")
_WORDS = ("Model: ", "Layout: ", "Each of ")


@dataclass(frozen=True, slots=True)
class Checked:
    """What checking a plan has found. Attributes: told: lines about each stage, by its name. absent: 'FILE (--flag)',
    by the name of the first stage that reads it, where no earlier one writes it."""

    told: Mapping[str, Sequence[str]]
    absent: Mapping[str, Sequence[str]]


def check_stages(plan: Plan, world_size: int | None) -> Checked:
    """Check all stages.

    Args:
        world_size: of the job; None: as few processes as each stage needs.

    Raises:
        UserError: what a stage would refuse, and of which stage it is.
    """
    quiet_libraries()
    told, absent = {}, {}
    stages = {stage.name: stage for stage in plan.stages}
    for place, stage in enumerate(plan.stages):
        root = stage
        while root.parent is not None:
            root = stages[root.parent]
        try:
            told[stage.name] = _check(stage, root, world_size)
        except UserError as error:
            raise type(error)(f"Stage {stage.name}: {error}") from None
        missing = _missing(stage, plan.stages[:place], plan.save)
        if missing:
            absent[stage.name] = missing
    return Checked(told, absent)


def apart(action: Callable[[], Checked]) -> Checked:
    """Do that in a process of its own.

    Raises:
        UserError: the one that it raises there.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            try:
                found = action()
                said: Any = [None, [found.told, found.absent]]
            except UserError as error:
                said = [type(error).__name__, str(error)]
            with os.fdopen(write, "w") as pipe:
                json.dump(said, pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError("the check of the stages has failed; its traceback stands above")
    kind, said = json.loads(answer)
    if kind is not None:
        raise getattr(errors, kind)(said)
    return Checked(*said)


def _check(stage: Stage, root: Stage, world_size: int | None) -> list[str]:
    """What a stage comes to, in lines."""
    if stage.until is not None:
        _check_metric(stage, stage.until, "until")
    if stage.gate is not None:
        _check_metric(stage, stage.gate.reach, "gate")
    content = sections(stage)
    if stage is not root:  # what its weights bring along, which are not there yet
        for key in ("tokenizer_model", "mask_token_id"):
            known = root.settings.get("tokenizer", {}).get(key)
            if known is not None and "tokenizer" in stage.command.sections:
                content.setdefault("tokenizer", {}).setdefault(key, known)
    # Sizes stand in the checkpoint that the first of its forebears began with
    stands_in = stage.parent is not None and bool(root.start)
    visit = Visit(stage, 1, None if stands_in else stage.parent)
    with tempfile.TemporaryDirectory() as folder:
        # A place where nothing is: what an earlier start has left of a stage says nothing of how the next one begins
        words = arguments(visit, str(Path(folder) / "run"), resumes=False)
        path = Path(folder) / "stage.yaml"
        yaml_file.write(content, path)
        at = words.index("--config")
        flags = ["--config", str(path), *words[at + 2 :], *(root.start if stands_in else ())]
        if not stage.command.trains and "--finetune" in flags:
            flags.remove("--finetune")
        if stage.command.name in _TRAINING:
            flags += ["--dry-run"]
            flags += [] if world_size is None else ["--dry-run-world-size", str(world_size)]
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                _TRAINING[stage.command.name](flags)
            return [line for line in said.getvalue().splitlines() if line.startswith(_WORDS) or " updates of " in line]
        config = parse(stage.command.name, dict(stage.command.sections), flags)
    if stage.command.name == "evaluate":
        _check_evaluation(config, world_size)
    return []


def _check_evaluation(config: dict[str, Any], world_size: int | None) -> None:
    from megatron_dlm.commands import evaluate
    from megatron_dlm.commands.dry_run import resolved_here

    evaluate.check_settings(config)
    known = config["model"].model_preset is not None or config["model"].num_layers is not None
    where = config["checkpoint"].hf_checkpoint or config["checkpoint"].load
    if known or (where is not None and Path(where).exists()):
        model, world = resolved_here(config, world_size or 1)
        evaluate.check_with_model(config, model, world)


def _check_metric(stage: Stage, reach: Reach, where: str) -> None:
    """Refuse to wait for a metric that the stage never records."""
    command, metric = stage.command.name, reach.metric
    starts = _RECORDED.get(command, ())
    if not metric.startswith(starts):
        raise ConfigError(
            f"{where} waits for {metric}, which {command} does not record. Use one of {one_of(starts)}...."
        )
    if not metric.startswith("eval/"):
        return
    from megatron_dlm.evaluation.evaluate import ways_of

    evaluation = parse_content(command, stage.command.sections, stage.settings, stage.name)["eval"]
    if command == "tracerl" and evaluation.eval_interval is None:
        raise ConfigError(f"{where} waits for {metric}, and eval_interval is not set. Set it, and eval_prompt_data.")
    known = [f"eval/{way}/{name}" for way in ways_of(evaluation) for name in _OF_EVALUATION]
    if metric not in known:
        raise ConfigError(f"{where} waits for {metric}, which is not measured. {suggest(metric, known, _use(known))}")


def _use(known: Sequence[str]) -> str:
    return f"Use {known[0]}, say."


def _missing(stage: Stage, before: Sequence[Stage], save: str) -> list[str]:
    """Files that a stage reads, that are not here, and that no earlier stage writes."""
    written = [str(value) for other in before for value in _texts(other) if value]
    found = []
    for section, key in (*INPUTS, ("trace", "input"), ("generate", "prompts")):
        given = stage.get(section, key) or []
        for path in [given] if isinstance(given, str) else given:
            made = path in written or Path(save) in Path(path).parents
            if not path.startswith(GENERATED) and not made and not Path(path).exists():
                found.append(f"{path} ({flag_name(key)})")
    for flag, path in zip(stage.start, stage.start[1:]):
        if flag in ("--load", "--hf-checkpoint") and not Path(path).exists():
            found.append(f"{path} ({flag})")
    return found


def _texts(stage: Stage) -> list[Any]:
    """Where a stage writes to, besides its own folder."""
    names = ("output", "output_prefix", "save", "save_debug_rollout_data", "save_eval_samples")
    return [keys[name] for keys in stage.settings.values() for name in names if name in keys]
