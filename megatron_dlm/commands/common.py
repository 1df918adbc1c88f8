"""What the commands share: the order in which a run is put together and taken down."""

from __future__ import annotations

import dataclasses
import logging as python_logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_dlm import platform
from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.rollout import RolloutConfig


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


def restore(state, checkpoint: CheckpointConfig) -> dict:
    """Load what --load names, if anything. Returns what was saved beside the weights; empty after a fresh start or with --finetune."""
    if checkpoint.load is None:
        return {}
    from megatron_dlm.checkpoint import distributed

    with_optimizer = not (checkpoint.finetune or checkpoint.no_load_optim) and state.optimizer is not None
    extra = distributed.load(state, checkpoint.load, with_optimizer=with_optimizer)
    if checkpoint.finetune:
        state.iteration = 0
        return {}
    return extra


def longest_prompt(*sets) -> int:
    """Tokens of the longest of all these prompts."""
    return max(len(prompt.token_ids) for prompts in sets for prompt in prompts)


def longest_response(rollout: RolloutConfig, evaluation: EvalConfig | None) -> int:
    return max(rollout.rollout_max_response_len, (evaluation and evaluation.eval_max_response_len) or 0)


def checkpointer(
    state, checkpoint: CheckpointConfig, extra: Callable[[], dict], say: Callable[[str], None]
) -> Callable[[int, bool], None]:
    """save(step, force): writes a checkpoint when --save-interval says so, always with `force`, never the same step twice."""
    from megatron_dlm.checkpoint import distributed

    written: list[int] = []

    def save(step: int, force: bool) -> None:
        due = force or (checkpoint.save_interval is not None and step % checkpoint.save_interval == 0)
        if checkpoint.save is None or not due or step in written:
            return
        distributed.save(state, checkpoint.save, step, extra(), with_optimizer=not checkpoint.no_save_optim)
        written.append(step)
        say(f"Saved iteration {step} to {checkpoint.save}")

    return save


@contextmanager
def running() -> Iterator[None]:
    """Around a command's work: process groups are left in order, whatever happens."""
    from megatron_dlm.parallel import groups

    try:
        yield
    finally:
        groups.destroy()
