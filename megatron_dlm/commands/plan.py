"""`megatron-dlm plan`: what a run will hold and take on devices that are not here.

Every distinct rank of the job is built on this CPU, over tensors without data (planning/world.py). No weights, no data
and no other processes are needed. The run is that of `sft` where the YAML has a section of that name, otherwise that of
`tracerl`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.commands import sft, tracerl
from megatron_dlm.commands.common import quiet_libraries
from megatron_dlm.commands.dry_run import resolved_here
from megatron_dlm.config import yaml_file
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.flags import parse
from megatron_dlm.config.plan import PlanConfig
from megatron_dlm.config.sections import pick
from megatron_dlm.config.validate import above, at_least, check_parallel
from megatron_dlm.config.validate_lora import check_lora
from megatron_dlm.config.validate_training import check_optimizer, check_trained


def main(argv: Sequence[str]) -> int | None:
    sections = sft.SECTIONS if _is_sft(argv) else tracerl.SECTIONS
    config = parse("plan", pick(*sections, "plan"), argv)
    plan = config["plan"]
    check_plan(plan)
    check_optimizer(config["optimizer"])
    check_lora(config["lora"])
    quiet_libraries()
    from megatron_dlm import platform
    from megatron_dlm.planning.hardware import hardware_named

    hardware = hardware_named(plan.plan_hardware)
    if plan.plan_json is not None:
        _try_to_write(plan.plan_json)
    platform.install()
    _without_data(config)
    model, world_size = resolved_here(config, plan.plan_world_size)
    check_parallel(config["parallel"], model, world_size)
    check_trained(model, config["optimizer"], config["parallel"])
    if "rl" in config:
        tracerl.check_with_model(config, model, world_size)
    else:
        sft.check_with_model(config, model, world_size)
    from megatron_dlm.planning import report
    from megatron_dlm.planning.job import job_of
    from megatron_dlm.planning.memory import GIB, plan_memory
    from megatron_dlm.planning.search import fullest, in_gib, propose

    memory = int(hardware.memory_bytes - plan.plan_reserve_gib * GIB)
    if memory <= 0:
        raise ConfigError(
            f"--plan-reserve-gib {plan.plan_reserve_gib} leaves nothing of the {in_gib(hardware.memory_bytes)} GiB of "
            f"{hardware.name}. Lower it."
        )
    job = job_of(config, model, world_size).changed(fp8_transposed=hardware.fp8_transposed)
    engine_fp8 = job.rollout is not None and job.rollout.rollout_weights == "fp8"
    for asked, flag in ((job.precision.recipe is not None, "--fp8-format"), (engine_fp8, "--rollout-weights fp8")):
        if asked and not hardware.fp8_flops:
            raise ConfigError(_without_fp8(plan.plan_hardware, flag))
    if job.precision.recipe == "mxfp8" and hardware.fp8_transposed:
        raise ConfigError(
            f"--fp8-recipe mxfp8 needs Blackwell GPUs, and --plan-hardware {plan.plan_hardware} is not one. Use "
            "another recipe."
        )
    ranks = plan_memory(job, memory, int(hardware.devices_per_node))
    cost, unknown = report.cost_of(job, hardware, ranks)
    for line in report.text(job, ranks, hardware, memory, cost):
        print(line)
    if unknown:
        print(f"Seconds are not known: {unknown}")
    if plan.plan_json is not None:
        _write(plan.plan_json, report.data(job, ranks, hardware, memory, cost))
    top = fullest(ranks)
    phase, peak = top.peak
    problem = None if top.engine is None else top.engine.problem
    if peak <= memory and problem is None:
        print(f"It fits, with {in_gib(memory - peak)} GiB to spare on the fullest rank.")
        return
    why = (
        problem
        if peak <= memory
        else f"Rank {top.place.rank} needs {in_gib(peak)} GiB in {phase}, and {hardware.name} has {in_gib(memory)}"
    )
    print("Looking for settings that fit ...", flush=True)
    found = propose(job, memory)
    hint = "No settings that were tried fit; use more or larger devices."
    if found is not None:
        hint = f"What fits, with {in_gib(found.peak)} GiB: add {found.flags}."
    raise ConfigError(f"This run does not fit. {why.rstrip('.')}. {hint}")


def _without_fp8(hardware: str, flag: str) -> str:
    if not Path(hardware).suffix:  # an entry of the table
        return f"--plan-hardware {hardware} has no products in FP8. Leave {flag} out."
    return (
        f"--plan-hardware {hardware} does not say fp8_flops, which {flag} needs. Add it, a data sheet's dense FLOP per "
        f"second in FP8, or leave {flag} out."
    )


def check_plan(plan: PlanConfig) -> None:
    """Refuse numbers that mean nothing."""
    at_least(plan, 1, "plan_world_size", "plan_prompt_length", "plan_response_length")
    above(plan, 0, "plan_tokens_per_step")
    at_least(plan, 0, "plan_reserve_gib")


def _without_data(config: dict[str, Any]) -> None:
    """A plan reads no data, so none has to be named."""
    for section, name in (("sft", "data_path"), ("rl", "prompt_data")):
        if section in config and not getattr(config[section], name):
            setattr(config[section], name, ["planned"])


def _is_sft(argv: Sequence[str]) -> bool:
    """Whether the YAML that is given has a section `sft`."""
    for here, after in zip(argv, [*argv[1:], ""]):
        path = after if here == "--config" else here.partition("=")[2] if here.startswith("--config=") else None
        if path:
            return "sft" in yaml_file.load(path)
    return False


def _try_to_write(path: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "a", encoding="utf-8").close()
    except OSError as error:
        raise _cannot_write(path, error) from None


def _write(path: str, figures: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"--plan-json {path} cannot be written to ({error.strerror}). Give a place where this user may write."
    )
