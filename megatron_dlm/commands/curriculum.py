"""`megatron-dlm curriculum`: stages one after the other, from one YAML (docs/curriculum.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_dlm.config.convert import ExportConfig, ImportConfig
from megatron_dlm.config.curriculum_run import CurriculumRunConfig
from megatron_dlm.config.errors import ConfigError, DataError, UserError
from megatron_dlm.config.fields import suggest
from megatron_dlm.config.flags import parse
from megatron_dlm.config.sections import pick, pick_for_rows, pick_parts
from megatron_dlm.config.validate import at_least, check_launch, needs
from megatron_dlm.curriculum.command_line import arguments, shown
from megatron_dlm.curriculum.controller import Controller
from megatron_dlm.curriculum.plan import Command, Plan, make_plan
from megatron_dlm.curriculum.progress import Visit
from megatron_dlm.curriculum.ranks import open_ranks
from megatron_dlm.curriculum.recipe import read_recipe
from megatron_dlm.curriculum.state import alone, discard_from, read_state
from megatron_dlm.curriculum.status import status


def main(argv: Sequence[str]) -> None:
    path, rest = _config_of(argv)
    run = parse("curriculum", {"curriculum_run": CurriculumRunConfig}, rest)["curriculum_run"]
    check_flags(run)
    if path is None:
        raise ConfigError("--config is not set. Give the YAML file of the curriculum.")
    plan = make_plan(read_recipe(path, run.set), commands())
    if run.status:
        print(status(plan))
        return
    if run.dry_run:
        print_plan(plan, run.dry_run_world_size)
        return
    check_launch(os.environ)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    is_main, checked, mistake = os.environ.get("RANK", "0") == "0", None, None
    if is_main:
        try:
            checked = _checked(plan, int(os.environ.get("WORLD_SIZE", "1")))
            _refuse_absent(checked.absent)
        except UserError as error:
            mistake = error
    ranks = open_ranks(os.environ)

    def begin() -> None:
        if mistake is not None:
            raise mistake
        if run.redo_from is not None:
            _redo_from(plan, run.redo_from)

    if ranks.rank:
        ranks.decide(begin)
        code = Controller(plan, ranks).run()
    else:
        with alone(plan.save) if mistake is None else _nothing():
            ranks.decide(begin)
            code = Controller(plan, ranks, _say).run()
    if code:
        raise SystemExit(code)


def commands() -> dict[str, Command]:
    """What a stage can be."""
    from megatron_dlm.commands import evaluate, generate, sft, trace, tracerl

    found = [
        Command("sft", pick(*sft.SECTIONS), True, ("sft", "train_iters"), gives_weights=True),
        Command("tracerl", pick(*tracerl.SECTIONS), True, ("rl", "num_rollout"), gives_weights=True),
        Command("evaluate", pick_parts(*evaluate.SECTIONS)),
        Command("generate", pick_parts(*generate.SECTIONS)),
        Command("trace", pick_for_rows(*trace.SECTIONS), complete_at=("trace", "output")),
        Command("convert megatron-to-hf", {"convert": ExportConfig}, saves_in=("--save", "hf")),
        Command(
            "convert hf-to-megatron",
            {"convert": ImportConfig},
            gives_weights=True,
            reads_weights=False,
            saves_in=("--save", ""),
        ),
    ]
    return {command.name: command for command in found}


def check_flags(run: CurriculumRunConfig) -> None:
    """Refuse flags that do not go together."""
    at_least(run, 1, "dry_run_world_size")
    needs(run, "dry_run_world_size", "dry_run", "which alone reckons with it")
    asked = [flag for flag, given in (("--status", run.status), ("--dry-run", run.dry_run)) if given]
    if run.redo_from is not None:
        asked.append(f"--redo-from {run.redo_from}")
    if len(asked) > 1:
        raise ConfigError(f"{asked[0]} and {asked[1]} are two things to do. Give one at a time.")


def print_plan(plan: Plan, world_size: int | None) -> None:
    """--dry-run: the commands of a first pass through the plan, and what each stage comes to; on rank 0."""
    if world_size is None and "WORLD_SIZE" in os.environ:
        world_size = int(os.environ["WORLD_SIZE"])
    checked = _checked(plan, world_size)
    if os.environ.get("RANK", "0") != "0":
        return
    for place, stage in enumerate(plan.stages, start=1):
        source = stage.parent
        print(f"{place}. {stage.name}: {shown(arguments(Visit(stage, 1, source), plan.save, False))}")
        for line in checked.told[stage.name]:
            print(f"   {line}")
        if stage.until is not None:
            print(f"   Until {stage.until.metric} is at least {stage.until.at_least:g}, or to its last step.")
        if stage.gate is not None:
            gate = stage.gate
            way = gate.otherwise if gate.repeat is None else f"back to {gate.repeat}, {gate.at_most} times at most"
            print(f"   Gate: {gate.reach.metric} at least {gate.reach.at_least:g}; otherwise {way}.")
        if stage.name in checked.absent:
            print(f"   Not here: {', '.join(checked.absent[stage.name])}.")
    print(f"{len(plan.stages)} stages, kept in {plan.save}. This was a dry run: nothing was started.", flush=True)


def _checked(plan: Plan, world_size: int | None):
    from megatron_dlm.commands.stage_checks import apart, check_stages

    return apart(lambda: check_stages(plan, world_size))


def _refuse_absent(absent) -> None:
    for stage, files in absent.items():
        raise DataError(
            f"Stage {stage} reads {files[0]}, which is not here, and no stage before it writes it. Give it."
        )


def _redo_from(plan: Plan, name: str) -> None:
    names = [stage.name for stage in plan.stages if name in (stage.name, stage.base)]
    if not names:
        known = [stage.name for stage in plan.stages]
        raise ConfigError(
            f"--redo-from {name} is no stage of {plan.path}. {suggest(name, known, f'Use {known[0]}, say.')}"
        )
    gone = discard_from(plan.save, read_state(plan.save), names, name)
    _say(f"Set aside in {plan.save}/discarded: {', '.join(gone)}. Delete it when it is not needed any more.")


def _config_of(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of --config, whose form is that of curricula, and all other arguments, with those of --set together."""
    path, rest, changes, changing, words = None, [], [], False, iter(argv)
    for word in words:
        if word == "--set":  # which may be given several times, in a script and behind it
            changing = True
            continue
        changing = changing and not word.startswith("--")
        if changing:
            changes.append(word)
            continue
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise ConfigError("--config needs a value. Write it after the flag; --help says of which kind.")
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    return path, [*rest, "--set", *changes] if "--set" in argv else rest


def _say(text: str) -> None:
    print(text, flush=True)


def _nothing():
    import contextlib

    return contextlib.nullcontext()
