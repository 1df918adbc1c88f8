"""What the commands share: the order in which a run is put together and taken down."""

from __future__ import annotations

import dataclasses
import errno
import logging as python_logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_dlm import platform
from megatron_dlm.commands.shared_folder import check_shared
from megatron_dlm.config import yaml_file
from megatron_dlm.config.errors import ConfigError, Interrupted, UserError
from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.log import ReportConfig
from megatron_dlm.config.profile import ProfileConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.validate import check_files, check_launch
from megatron_dlm.config.validate_profile import check_profile_here, place_of_traces
from megatron_dlm.data.jsonl import write_jsonl

if TYPE_CHECKING:
    from megatron_dlm.data.prompts import Prompt
    from megatron_dlm.rewards.code_options import CodeOptions

T = TypeVar("T")

SETTINGS = "config.yaml"  # file within --save


def prepare_process() -> None:
    """Before anything imports megatron-core: the device, and no chatter of libraries."""
    quiet_libraries()
    check_launch(os.environ)
    platform.install()


def quiet_libraries() -> None:
    """No chatter of libraries about optional parts of theirs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("megatron", "transformers", "matplotlib", "tensorboard", "torch.utils.cpp_extension"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    writer = "megatron.core.dist_checkpointing"  # it logs what it then raises
    python_logging.getLogger(writer).setLevel(python_logging.CRITICAL)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as plain data, to be recorded with a run."""
    return {name: dataclasses.asdict(section) for name, section in config.items()}


def together(action: Callable[[], T]) -> T:
    """Do something on every rank; a user's mistake that any of them finds there (the first of them, if several do) is
    raised on all, so that none waits for another. It is told by rank 0, on each host by one, for the launcher ends the
    others as soon as one has left. Collective."""
    import torch.distributed as dist

    from megatron_dlm.parallel.exchange import gather_objects
    from megatron_dlm.parallel.meeting import speaks

    result = mistake = None
    try:
        result = action()
    except UserError as error:
        mistake = error
    for rank, found in enumerate(gather_objects(mistake)):
        if found is not None:
            found = mistake if rank == dist.get_rank() else found
            found.rank, found.told = rank, not speaks()
            raise found
    return result


def isolation_of(code: CodeOptions, prompts: Sequence[Prompt], verifier: str) -> str | None:
    """Which isolation the programs of these prompts have: a sentence for the log, or several where the processes' hosts
    differ; None when no prompt asks for a program. Collective.

    Raises:
        ConfigError: a host cannot run them.
    """
    from megatron_dlm.parallel.exchange import gather_objects

    found = Counter(gather_objects(together(lambda: code.check(prompts, verifier))))
    if len(found) == 1:
        return next(iter(found))
    return " ".join(f"On {count} of {found.total()} processes: {said}" for said, count in found.items())


def open_outputs(config: dict[str, Any], is_main: bool) -> None:
    """Make sure, before anything is built, that all places can be written to. Collective.

    Raises:
        ConfigError: one of them cannot, or --save is not the same folder on all hosts.
    """
    if "profile" in config:
        _check_profile_here(config["profile"])
    together(lambda: _open_outputs(config) if is_main else None)
    save = getattr(config.get("checkpoint"), "save", None)
    if save is not None:
        check_shared("--save", save, is_main)


def _check_profile_here(profile: ProfileConfig) -> None:
    import torch.distributed as dist

    check_profile_here(profile, dist.get_world_size(), platform.is_cuda())


def _open_outputs(config: dict[str, Any]) -> None:
    check_files(config)
    folders = [("checkpoint", "save"), ("rl", "save_debug_rollout_data")]
    folders += [("logging", "wandb_save_dir"), ("logging", "tensorboard_dir")]
    folders += [("profile", "profile_dir"), ("profile", "memory_snapshot_dir")]
    # These appear at the end: what is there stays until then
    written_whole = [(name, "output") for name in ("generate", "score", "trace")]
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
    """Leave the settings in --save. Called when a run is about to begin: one that never does must not overwrite those
    of an earlier one.

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


def longest_prompt(*sets) -> int:
    """Tokens of the longest of all these prompts."""
    return max(len(prompt.token_ids) for prompts in sets for prompt in prompts)


def longest_response(engine: EngineConfig, evaluation: EvalConfig) -> int:
    """Tokens of the longest response, with room for the last block of an evaluation in blocks of its own."""
    longest = max(engine.rollout_max_response_len, evaluation.eval_max_response_len or 0)
    return longest + max(evaluation.eval_block_size or [0])


def nothing_left(report, done: int, wanted: int) -> bool:
    """Whether a resumed run has already reached its end; says so."""
    if done < wanted:
        return False
    report.say(f"Nothing left to do: iteration {done} of {wanted}.")
    return True


def ended_before(report, run: TrainingRunConfig, restored: Mapping[str, Any]) -> bool:
    """Whether a resumed run has ended already because --exit-metric was reached; says so. `restored`: what its
    checkpoint holds beside the weights."""
    reached = restored.get("exit_metric") or {}
    if run.exit_metric is None or reached.get("metric") != run.exit_metric:
        return False
    if reached["value"] < run.exit_metric_at_least:
        return False  # more is asked for now
    report.say(
        f"Nothing left to do: {run.exit_metric} reached {reached['value']:.6g} at step {reached['step']} "
        f"(--exit-metric-at-least {run.exit_metric_at_least:g})."
    )
    return True


@contextmanager
def profiled(config: Mapping[str, Any], groups, say: Callable[[str], None]) -> Iterator[None]:
    """Around what a command spends its time with: --profile and its neighbours (training/profile.py)."""
    from megatron_dlm.training.profile import profiling

    with profiling(config["profile"], place_of_traces(config), groups.rank, say):
        yield


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
