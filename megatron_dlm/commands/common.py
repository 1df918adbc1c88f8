"""What the commands share: the order in which a run is put together and taken down."""

from __future__ import annotations

import dataclasses
import logging as python_logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron_dlm import platform
from megatron_dlm.config import yaml_file
from megatron_dlm.config.checkpoint import CheckpointConfig, LoadConfig
from megatron_dlm.config.errors import ConfigError, UserError
from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.log import ReportConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.config.tokenizer import TokenizerConfig

T = TypeVar("T")


def prepare_process() -> None:
    """Before anything imports megatron-core: the device, and no chatter of libraries about optional parts of theirs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("megatron", "transformers"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    platform.install()


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as plain data, to be recorded with a run."""
    return {name: dataclasses.asdict(section) for name, section in config.items()}


def together(action: Callable[[], T]) -> T:
    """Do something on every rank; a user's mistake that rank 0 finds there is raised on all, so that none waits for it.
    Collective."""
    from megatron_dlm.parallel.exchange import broadcast_object

    result = mistake = None
    try:
        result = action()
    except UserError as error:
        mistake = error
    mistake = broadcast_object(mistake, src=0)
    if mistake is not None:
        raise mistake
    return result


def open_outputs(config: dict[str, Any], is_main: bool) -> None:
    """Make sure, before anything is built, that all places can be written to; and leave the settings in --save.
    Collective.

    Raises:
        ConfigError: one of them cannot.
    """
    together(lambda: _open_outputs(config) if is_main else None)


def _open_outputs(config: dict[str, Any]) -> None:
    folders = [("checkpoint", "save"), ("logging", "wandb_save_dir"), ("rl", "save_debug_rollout_data")]
    for section, name in [*folders, ("logging", "metrics_jsonl")]:
        given = getattr(config.get(section), name, None)
        if given is None:
            continue
        try:
            folder = Path(given) if (section, name) in folders else Path(given).parent
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"probe")
            if folder != Path(given):
                open(given, "a", encoding="utf-8").close()
            if name == "save":
                yaml_file.dump(config, folder / "config.yaml")
        except OSError as error:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {given} cannot be written to ({error.strerror}). Give a place where this user may write."
            ) from None


def open_report(logging: ReportConfig, is_main: bool, config: dict[str, Any]):
    """The run's `Report`, before any model is built. Collective; use it as a context manager."""
    from megatron_dlm.training.report import Report

    return together(lambda: Report(logging, is_main, settings_of(config)))


def read_prompts(sources: list[str], session, words: TokenizerConfig, longest: int) -> tuple[list, str]:
    """The prompts of some sources, and a few words about how many there are and what was left out."""
    from megatron_dlm.data.prompts import load_prompts

    prompts, dropped = load_prompts(
        sources, session.tokenizer, words.prompt_template, words.apply_chat_template, longest
    )
    return prompts, (
        f"{len(prompts)} prompts (left out: {dropped.too_long} too long, {dropped.duplicate} duplicate, "
        f"{dropped.no_answer} without an answer)"
    )


def restore(state, checkpoint: LoadConfig, model: ModelConfig, stage: str | None) -> dict:
    """Load what --load names, if anything.

    Args:
        model: resolved; the one that wrote the checkpoint must be the same.
        stage: what is resumed; None where only the weights are wanted.

    Returns:
        What was saved beside the weights; empty after a fresh start or with --finetune.
    """
    if checkpoint.load is None:
        return {}
    from megatron_dlm.checkpoint import distributed, fit

    finetune = isinstance(checkpoint, CheckpointConfig) and checkpoint.finetune

    def check(saved: dict[str, Any]) -> None:
        if stage is not None and not finetune:
            fit.check_stage(saved, stage, checkpoint.load)
        fit.check_same_model(saved, model, checkpoint.load, finetune)

    resume = state.optimizer is not None and not (finetune or checkpoint.no_load_optim)
    extra = distributed.load(state, checkpoint.load, with_optimizer=resume, check=check)
    if finetune:
        state.iteration = 0
        return {}
    return extra


def longest_prompt(*sets) -> int:
    """Tokens of the longest of all these prompts."""
    return max(len(prompt.token_ids) for prompts in sets for prompt in prompts)


def longest_response(engine: EngineConfig, evaluation: EvalConfig) -> int:
    return max(engine.rollout_max_response_len, evaluation.eval_max_response_len or 0)


def nothing_left(report, done: int, wanted: int) -> bool:
    """Whether a resumed run has already reached its end; says so."""
    if done < wanted:
        return False
    report.say(f"Nothing left to do: iteration {done} of {wanted}.")
    return True


def checkpointer(
    state,
    checkpoint: CheckpointConfig,
    model: ModelConfig,
    stage: str,
    progress: Callable[[], dict],
    say: Callable[[str], None],
) -> Callable[[int, bool], None]:
    """save(step, force): writes a checkpoint when --save-interval says so, always with `force`, never the same step
    twice.

    Stage and model are stored beside the weights, with what `progress` returns.
    """
    from megatron_dlm.checkpoint import distributed

    written: list[int] = []

    def save(step: int, force: bool) -> None:
        due = force or (checkpoint.save_interval is not None and step % checkpoint.save_interval == 0)
        if checkpoint.save is None or not due or step in written:
            return
        extra = {"stage": stage, "model": dataclasses.asdict(model), **progress()}
        distributed.save(state, checkpoint.save, step, extra, with_optimizer=not checkpoint.no_save_optim)
        written.append(step)
        say(f"Saved iteration {step} to {checkpoint.save}")

    return save


@contextmanager
def running() -> Iterator[None]:
    """Around a command's work: leaves the process groups at its end.

    Not after an error: the other ranks may be inside a collective operation, and leaving would wait for them.
    """
    from megatron_dlm.parallel import groups

    yield
    groups.destroy()
