"""`--dry-run`: what a training run would be, found out without weights, data, tokenizer or other processes.

Everything that a run refuses for its settings is refused here by the same checks. Files that the settings name and that
are not here are listed, for a run is often prepared on another machine than it is for; those that are here tell about
model and vocabulary as in a run.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_dlm import platform
from megatron_dlm.commands.common import quiet_libraries
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.objective import with_method
from megatron_dlm.config.overrides import of_the_function
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.validate import check_files, check_model, check_parallel
from megatron_dlm.config.validate_training import check_stop_tokens, check_trained
from megatron_dlm.config.value import policy_updates
from megatron_dlm.model.presets import PRESETS
from megatron_dlm.model.shape import resolve, transformer_config
from megatron_dlm.model.size import model_size

INPUTS = (
    ("checkpoint", "load"),
    ("checkpoint", "hf_checkpoint"),
    ("tokenizer", "tokenizer_model"),
    ("sft", "data_path"),
    ("rl", "prompt_data"),
    ("eval", "eval_prompt_data"),
    ("rl", "ref_load"),
    ("rl", "teacher_load"),
    ("value", "value_load"),
    ("rollout", "sglang_python"),
)
"""Settings that name what a run reads."""
GENERATED = "reasoning_gym:"  # prompts that come from no file

Check = Callable[[dict[str, Any], ModelConfig, int], None]


def dry_run(config: dict[str, Any], check: Check, plan: Callable[[dict[str, Any]], str]) -> None:
    """Check the settings of a training command and print what they come to; on rank 0 of a job, if there is one.

    Args:
        config: its sections; checked as far as they can be without a model. What a checkpoint that is here says about
            the model is filled in.
        check: refuses what does not fit a model and a number of processes: check(config, model, world_size).
        plan: a line about the steps of the run, from settings that were checked.

    Raises:
        UserError: what a run would refuse.
    """
    present, absent = _inputs(config)
    quiet_libraries()
    _complete(config, present)
    tokenizer = _tokenizer(config)
    check_files(config)
    unknown = _sizes_are_elsewhere(config, absent)
    lines = ["Settings other than the default ones:", *_changed(config)]
    if unknown:
        lines.append(f"Model: unknown until {unknown} is here; whether the settings fit it was not checked.")
    else:
        model, whole = _resolved(config["model"], tokenizer)
        if model.transformer_overrides:
            platform.install()  # megatron-core is asked about them
        check_model(model)
        world_size = _world_size(config)
        check_parallel(config["parallel"], model, world_size)
        check_trained(model, config["optimizer"], config["parallel"])
        check(config, model, world_size)
        if tokenizer is not None and "rollout" in config:
            check_stop_tokens(config["rollout"], tokenizer.vocab_size, tokenizer.mask_id)
        if model.transformer_overrides:
            transformer_config(model, config["parallel"])  # megatron-core refuses what does not go together
        lines += [_model_line(config, model, whole), _layout_line(config, world_size), plan(config)]
    lines += [f"Here: {', '.join(present)}."] if present else []
    lines += [f"Not here: {', '.join(absent)}."] if absent else []
    lines.append("This was a dry run: nothing was started, and no weights and no data were read.")
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)


def resolved_here(config: dict[str, Any], world_size: int | None = None) -> tuple[ModelConfig, int]:
    """The model of a run with every size filled in and checked, and its number of processes, as far as what is here
    tells; for commands that neither train nor read weights.

    Raises:
        UserError: sizes that nothing here tells, or that cannot be.
    """
    present, absent = _inputs(config)
    _complete(config, present)
    unknown = _sizes_are_elsewhere(config, absent)
    if unknown:
        raise ConfigError(f"The model's sizes are in {unknown}, which is not here. Give --model-preset, or the sizes.")
    model, whole = _resolved(config["model"], _tokenizer(config) if config["tokenizer"].tokenizer_model else None)
    if not whole:
        raise ConfigError("The size of the vocabulary is not known here. Give --vocab-size.")
    check_model(model)
    return model, world_size or _world_size(config)


def rl_plan(config: dict[str, Any]) -> str:
    """What the steps of `tracerl` are."""
    rl, rollout, value = config["rl"], config["rollout"], config["value"]
    responses, updates = rollout.rollout_batch_size * rollout.n_samples_per_prompt, updates_of(rl, rollout)
    size = rl.global_batch_size or -(-responses // updates)
    return (
        f"Each of {rl.num_rollout:,} RL steps: {rollout.rollout_batch_size:,} prompts x "
        f"{rollout.n_samples_per_prompt:,} responses = {responses:,} responses "
        f"of up to {rollout.rollout_max_response_len:,} tokens; up to "
        f"{updates:,} updates of {size:,} responses, in rows of {rl.max_tokens_per_row:,} tokens. "
        f"In all up to {policy_updates(value, rl.num_rollout, updates):,} updates."
    )


def updates_of(rl: RLConfig, rollout: RolloutConfig) -> int:
    """Updates in an RL step that learns from all its responses."""
    responses = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    return rl.num_steps_per_rollout or -(-responses // rl.global_batch_size)


def sft_plan(config: dict[str, Any]) -> str:
    """What the steps of `sft` are."""
    sft = config["sft"]
    return (
        f"{sft.train_iters:,} updates of {sft.global_batch_size:,} samples, in rows of {sft.max_tokens_per_row:,} "
        f"tokens: {sft.train_iters * sft.global_batch_size:,} samples in all."
    )


def _inputs(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is read, as 'PATH (--flag)': what is here, and what is not."""
    present: list[str] = []
    absent: list[str] = []
    for section, name in INPUTS:
        given = getattr(config.get(section), name, None) or []
        for path in [given] if isinstance(given, str) else given:
            if not path.startswith(GENERATED):
                here = Path(path).exists() or (name == "data_path" and Path(path + ".idx").exists())  # or its prefix
                (present if here else absent).append(_told(name, path))
    return present, absent


def _told(name: str, path: str) -> str:
    return f"{path} ({flag_name(name)})"


def _complete(config: dict[str, Any], present: Sequence[str]) -> None:
    """Take from a checkpoint that is here what the settings leave open."""
    from megatron_dlm.commands.weights import complete

    where = config["checkpoint"]
    given = [(name, path) for name in ("load", "hf_checkpoint") if (path := getattr(where, name)) is not None]
    if len(given) > 1 or any(_told(name, path) in present for name, path in given):  # two of them are refused there
        platform.install()
        complete(config)


def _tokenizer(config: dict[str, Any]):
    """The tokenizer, or None if it is not here."""
    words, where = config["tokenizer"], config["checkpoint"]
    if words.tokenizer_model is None:
        if where.load is None and where.hf_checkpoint is None:
            raise ConfigError("--tokenizer-model is not set. Give the folder of a tokenizer, or --load a checkpoint.")
        return None  # it is where the checkpoint is
    if not Path(words.tokenizer_model).exists():
        return None
    from megatron_dlm.data.tokenizer import Tokenizer

    return Tokenizer(words.tokenizer_model, words.mask_token_id)


def _sizes_are_elsewhere(config: dict[str, Any], absent: Sequence[str]) -> str | None:
    """The checkpoint that would tell the model's sizes and is not here."""
    model, where = config["model"], config["checkpoint"]
    if model.model_preset is not None or model.num_layers is not None:
        return None
    given = [(name, path) for name in ("load", "hf_checkpoint") if (path := getattr(where, name)) is not None]
    return next((path for name, path in given if _told(name, path) in absent), None)


def _resolved(model: ModelConfig, tokenizer) -> tuple[ModelConfig, bool]:
    """The model with every size filled in, and whether that of its vocabulary is known."""
    size = None if tokenizer is None else tokenizer.vocab_size
    known = size or model.vocab_size or PRESETS.get(model.model_preset, {}).get("vocab_size")
    if known is None:
        model = dataclasses.replace(model, vocab_size=max(model.make_vocab_size_divisible_by, 1))
    return resolve(model, size), known is not None


def _world_size(config: dict[str, Any]) -> int:
    """Processes that the run is to have: those that are given, those of the launcher, or as few as the layout needs."""
    given = config["run"].dry_run_world_size
    if given is not None:
        return given
    launched = os.environ.get("WORLD_SIZE", "")
    if launched.isdecimal() and int(launched):
        return int(launched)
    layout, rollout = config["parallel"], config.get("rollout")
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    shard = tensor if layout.expert_tensor_parallel_size is None else layout.expert_tensor_parallel_size
    engine = getattr(rollout, "rollout_tensor_model_parallel_size", None) or 1
    shared = getattr(rollout, "rollout_expert_model_parallel_size", None) or 1
    return max(math.lcm(tensor * stages, layout.expert_model_parallel_size * shard * stages, engine, shared), 1)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines with escapes, on one."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _changed(config: dict[str, Any]) -> list[str]:
    """The settings that differ from the defaults, as the YAML of --config, and those that the RL method decides."""
    found = {}
    for name, section in config.items():
        default = type(section)()
        values = {
            field.name: value
            for field in dataclasses.fields(section)
            if (value := getattr(section, field.name)) != getattr(default, field.name)
            and not field.name.startswith("dry_run")
        }
        if values:
            found[name] = values
    text = yaml.dump(found, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    lines = [f"  {line}" for line in text.splitlines()]
    if "rl" not in config:
        return lines
    given, whole = (dataclasses.asdict(section) for section in (config["rl"], with_method(config["rl"])))
    decided = ", ".join(f"{name} {value}" for name, value in whole.items() if value != given[name])
    return [*lines, f"By --rl-method {config['rl'].rl_method}: {decided or 'nothing else'}."]


def _model_line(config: dict[str, Any], model: ModelConfig, whole: bool) -> str:
    size = model_size(model)
    count = (
        f"{size.total:,} parameters" if whole else f"{size.body:,} parameters besides those of its unknown vocabulary"
    )
    if size.idle and whole:
        count += f", {size.active:,} for each token"
    if of_the_function(model.transformer_overrides):
        count = f"{count} (but for what --transformer-override changes)"
    value = getattr(config.get("value"), "use_value_model", False)
    text = "full attention" if model.full_attention else f"attention block {model.block_size}"
    heads = f"{model.num_attention_heads} heads in {model.num_query_groups} groups"
    return (
        f"Model: {count}; {model.num_layers} layers of width {model.hidden_size}, {heads}; {text}; "
        f"{'bf16' if model.bf16 else 'fp32'}."
        + (f" Value model: {size.value:,} parameters." if value and whole else "")
    )


def _layout_line(config: dict[str, Any], world_size: int) -> str:
    layout, rollout = config["parallel"], config.get("rollout")
    tensor, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    context, parts = layout.context_parallel_size, layout.num_virtual_stages_per_pipeline_rank
    data = world_size // (tensor * context * stages)
    line = f"Layout: {_counted(world_size, 'process', 'processes')} = tensor {tensor} x "
    line += f"context {context} x " if context > 1 else ""
    line += f"pipeline {stages}{'' if parts is None else f' ({parts} virtual stages each)'} x data {data}"
    if layout.expert_model_parallel_size > 1:
        line += f", experts over {layout.expert_model_parallel_size}"
    if rollout is not None:
        size = rollout.rollout_tensor_model_parallel_size or tensor
        engines = _counted(world_size // size, "rollout engine", "rollout engines")
        line += f"; {engines} of {_counted(size, 'process', 'processes')}"
        shared = rollout.rollout_expert_model_parallel_size or layout.expert_model_parallel_size
        if shared > 1 and rollout.rollout_backend == "native":
            line += f", experts over {shared}"
        if rollout.rollout_weights == "fp8":
            line += ", with weights of their own in FP8"
    return line + "."


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
