"""What the commands share: the order in which a run is put together and taken down."""

from __future__ import annotations

import dataclasses
import errno
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
from megatron_dlm.config.errors import ConfigError, Interrupted, UserError
from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.log import ReportConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.validate import check_launch
from megatron_dlm.data.jsonl import write_jsonl

T = TypeVar("T")

TOKENIZER = "tokenizer"  # folder within a checkpoint
SETTINGS = "config.yaml"  # file within --save
_OF_THIS_RUN = ("model_preset", "init_method_std", "bf16", "fp64")  # say nothing about the weights that are stored


def prepare_process() -> None:
    """Before anything imports megatron-core: the device, and no chatter of libraries about optional parts of theirs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("megatron", "transformers", "matplotlib", "tensorboard"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    writer = "megatron.core.dist_checkpointing"  # it logs what it then raises
    python_logging.getLogger(writer).setLevel(python_logging.CRITICAL)
    check_launch(os.environ)
    platform.install()


def complete(config: dict[str, Any]) -> None:
    """Take what the user did not say about model and tokenizer from the checkpoint of --load, if there is one.

    A size that is given, by itself or through a preset, stays; whether it fits the weights is asked later (`restore`).

    Raises:
        CheckpointError: --load names no readable checkpoint.
    """
    checkpoint, model, words = (config[name] for name in ("checkpoint", "model", "tokenizer"))
    if checkpoint.load is None:
        return
    from megatron_dlm.checkpoint import distributed

    folder = distributed.find(checkpoint.load, checkpoint.ckpt_step)
    stored = distributed.read_extra(folder).get("model", {})
    for field in dataclasses.fields(ModelConfig):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if field.name == "moe_ffn_hidden_size" and stored.get("num_experts") is None:
            continue  # repeats the width of a dense model
        if field.name not in stored or field.name in _OF_THIS_RUN or getattr(model, field.name) != default:
            continue
        if default is not None or model.model_preset is None:
            setattr(model, field.name, stored[field.name])
    if words.tokenizer_model is None and (folder / TOKENIZER).is_dir():
        words.tokenizer_model = str(folder / TOKENIZER)


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
    """Make sure, before anything is built, that all places can be written to. Collective.

    Raises:
        ConfigError: one of them cannot.
    """
    together(lambda: _open_outputs(config) if is_main else None)


def _open_outputs(config: dict[str, Any]) -> None:
    folders = [("checkpoint", "save"), ("rl", "save_debug_rollout_data")]
    folders += [("logging", "wandb_save_dir"), ("logging", "tensorboard_dir")]
    written_whole = [("generate", "output"), ("score", "output")]  # appear at the end: what is there stays until then
    for section, name in [*folders, ("logging", "metrics_jsonl"), ("eval", "save_eval_samples"), *written_whole]:
        given = getattr(config.get(section), name, None)
        if given is None:
            continue
        try:
            folder = Path(given) if (section, name) in folders else Path(os.path.realpath(given)).parent
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"probe")
            if (section, name) in written_whole:
                if Path(given).is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            elif (section, name) not in folders:
                open(given, "a", encoding="utf-8").close()
            if name == "save" and (folder / SETTINGS).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{SETTINGS} in it is a folder")
        except OSError as error:
            raise _cannot_write("--" + name.replace("_", "-"), given, error) from None


def keep_settings(config: dict[str, Any], is_main: bool) -> None:
    """Leave the settings in --save. Called when a run is about to begin: one that never does must not overwrite those of
    an earlier one.

    Raises:
        ConfigError: they cannot be written.
    """
    folder = config["checkpoint"].save
    if folder is None or not is_main:
        return
    try:
        yaml_file.dump(config, Path(folder) / SETTINGS)
    except OSError as error:
        raise _cannot_write("--save", folder, error) from None


def _cannot_write(flag: str, given: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{flag} {given} cannot be written to ({error.strerror}). Give a place where this user may write."
    )


def write_output(path: str, records: list[dict]) -> None:
    """Write --output. Only rank 0 calls it.

    Raises:
        ConfigError: it cannot be written, because the disk is full, for example.
    """
    try:
        write_jsonl(path, records)
    except OSError as error:
        raise _cannot_write("--output", path, error) from None


def open_report(logging: ReportConfig, is_main: bool, config: dict[str, Any]):
    """The run's `Report`, before any model is built. Collective; use it as a context manager."""
    from megatron_dlm.training.report import Report

    folder = getattr(config.get("checkpoint"), "save", None)
    return together(lambda: Report(logging, is_main, settings_of(config), folder))


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


def restore(state, checkpoint: LoadConfig, model: ModelConfig, stage: str | None, any_block_size: bool = False) -> dict:
    """Load what --load names, if anything.

    Args:
        model: resolved; the one that wrote the checkpoint must be the same.
        stage: what is resumed; None where only the weights are wanted.
        any_block_size: whether the weights are used with the block size of this run, whatever theirs was.

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
        fit.check_same_model(saved, model, checkpoint.load, finetune or any_block_size)

    resume = state.optimizer is not None and not (finetune or checkpoint.no_load_optim)
    extra = distributed.load(state, checkpoint.load, checkpoint.ckpt_step, with_optimizer=resume, check=check)
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
    session,
    state,
    checkpoint: CheckpointConfig,
    stage: str,
    progress: Callable[[], dict],
    say: Callable[[str], None],
) -> Callable[[int, bool], None]:
    """save(step, force): writes a checkpoint when --save-interval says so, always with `force`, never the same step
    twice; and deletes those that --keep-last-n leaves over.

    Stage and model are stored beside the weights, with what `progress` returns; so is the tokenizer.
    """
    from megatron_dlm.checkpoint import distributed

    written: list[int] = []

    def save(step: int, force: bool) -> None:
        due = force or (checkpoint.save_interval is not None and step % checkpoint.save_interval == 0)
        if checkpoint.save is None or not due or step in written:
            return
        extra = {"stage": stage, "model": dataclasses.asdict(session.model), **progress()}
        distributed.save(
            state,
            checkpoint.save,
            step,
            extra,
            with_optimizer=not checkpoint.no_save_optim,
            add_files=lambda folder: session.tokenizer.save(folder / TOKENIZER),
        )
        written.append(step)
        say(f"Saved iteration {step} to {checkpoint.save}")
        if checkpoint.keep_last_n is not None and session.groups.is_main:
            distributed.keep_newest(checkpoint.save, step, checkpoint.keep_last_n)

    return save


@contextmanager
def running() -> Iterator[None]:
    """Around a command's work: leaves the process groups at its end.

    Not after an error: the other ranks may be inside a collective operation, and leaving would wait for them.
    """
    from megatron_dlm.parallel import groups

    try:
        yield
    except Interrupted:  # an end on which all ranks have agreed
        groups.destroy()
        raise
    groups.destroy()
