"""Distributed checkpoints of a TrainState: written in parallel, readable under any other layout.

    DIR/iter_0000010/                          model, optimizer, schedule, what FP8 knows of earlier steps, the caller's
                                               `extra` and files
    DIR/latest_checkpointed_iteration.txt      "10"

Whatever a crash leaves behind, the text file names a whole checkpoint (checkpoint/places.py).

Tensors are stored by their name and place in the whole model (megatron-core's dist_checkpointing, optimizer state
included), so tensor, pipeline and data-parallel sizes may change between saving and loading. Whether the optimizer is
distributed may not. Generator states are not stored: every draw of this package has a key of its own.

Invariants (tests/checkpoint/test_distributed.py):
  - training that is saved and loaded goes on exactly as if it had not been, in the same layout or another;
  - a failed save leaves the previous checkpoint whole and used.
"""

from __future__ import annotations

import functools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.fp8_utils import is_float8tensor
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dlm import platform
from megatron_dlm.checkpoint import fp8_history, optimizer_state
from megatron_dlm.checkpoint.adapters import LORA, adapters_of, check_adapters, is_new, merged_afterwards
from megatron_dlm.checkpoint.fp8_history import EXTRA
from megatron_dlm.checkpoint.places import find, iteration_folder, name_as_latest, put_in_place, reading, reason_of
from megatron_dlm.config.errors import CheckpointError, ResourceError
from megatron_dlm.parallel.exchange import broadcast_object
from megatron_dlm.parallel.meeting import speaks
from megatron_dlm.platform.megatron import common_state
from megatron_dlm.training.optimizer import forget_stored_rates
from megatron_dlm.training.sleep import wake
from megatron_dlm.training.state import TrainState


def save(
    state: TrainState,
    directory: str | Path,
    iteration: int,
    extra: dict[str, Any],
    with_optimizer: bool = True,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint. Collective. A sleeping state wakes for its optimizer.

    Args:
        extra: what else the caller wants back; anything that JSON can hold. Rank 0's is stored.
        add_files: called on rank 0 with the checkpoint's folder before that is put in its place; writes further files.

    Raises:
        ResourceError: it cannot be written. Earlier checkpoints are as they were.
    """
    state.gather_parameters()
    if (adapters := adapters_of(state)) is not None:
        extra = {**extra, LORA: adapters}
    optimizer_kind = optimizer_state.kind(state.optimizer) if with_optimizer and state.optimizer is not None else None
    content = _model_content(state)
    if fp8_history.keeps_history(state.config):
        content |= _histories(state, fp8_history.to_save)
    if optimizer_kind is not None:
        wake(state)
        with platform.cuda_calls_on_cpu():
            content["optimizer"] = optimizer_state.to_save(state.optimizer, _model_content(state), _metadata(state))
        content["scheduler"] = state.scheduler.state_dict()
    write(content, directory, iteration, extra, add_files, state.iteration, optimizer_kind)


def write(
    content: dict[str, Any],
    directory: str | Path,
    iteration: int,
    extra: dict[str, Any],
    add_files: Callable[[Path], None] | None,
    updates: int = 0,
    optimizer_kind: str | None = None,
) -> None:
    """Write the content of a checkpoint, and give it its place when it is whole. Collective; see `save`."""
    final = iteration_folder(directory, iteration)
    partial = final.with_name(f".{final.name}.partial")
    is_main = dist.get_rank() == 0
    if is_main:
        for kind in ("partial", "deleted"):  # left over from saves that died; one run at a time writes here
            for leftover in Path(directory).glob(f".iter_*.{kind}"):
                shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    content["run"] = json.dumps(
        {"iteration": iteration, "updates": updates, "optimizer": optimizer_kind, "extra": extra}
    )
    with platform.cuda_calls_on_cpu(), _sigterm_held_back(), _writing(final):
        dist_checkpointing.save(content, str(partial))
    dist.barrier()
    if is_main:
        if add_files is not None:
            add_files(partial)
        put_in_place(partial, final)
        name_as_latest(Path(directory), iteration)
    dist.barrier()


def read_extra(folder: Path, flag: str = "--load") -> dict[str, Any]:
    """What the caller of `save` stored beside the weights of a checkpoint. Reads no tensor; not collective.

    Args:
        flag: that named the checkpoint.
    """
    return _read_run(folder, flag)["extra"]


def load(
    state: TrainState,
    directory: str | Path,
    iteration: int | None = None,
    with_optimizer: bool = True,
    check: Callable[[dict[str, Any]], None] | None = None,
    flag: str = "--load",
) -> dict[str, Any]:
    """Read a checkpoint into the state: weights, and with the optimizer also its state, its place in the schedule, and
    `state.iteration`. Collective.

    Without the optimizer the weights and `state.iteration` are read; the schedule stays as it is.

    Args:
        check: called with the `extra` that was saved before anything else is read; it may refuse the checkpoint.
        flag: that named the directory.

    Returns:
        The `extra` that was saved.

    Raises:
        CheckpointError: no such checkpoint, it is damaged, it does not fit the model or its adapters, or the optimizer
            state that is asked for is not in it.
    """
    folder = _find(state, directory, iteration, flag)
    run = _read_run(folder, flag)
    if check is not None:
        check(run["extra"])
    there, with_optimizer = run["extra"].get(LORA), with_optimizer and state.optimizer is not None
    check_adapters(there, adapters_of(state), str(folder), with_optimizer)
    if there is not None and adapters_of(state) is None and state.config.fp8_param:
        raise CheckpointError(
            f"The checkpoint {folder} has adapters, which weights that are kept in FP8 (--fp8-param-gather) cannot "
            "take in. Load it once without that flag, and save it."
        )
    wake(state)
    with merged_afterwards(state, there):
        loaded = _fill(state, folder, run, there, with_optimizer)
    if state.optimizer is not None and not with_optimizer:
        exact = {
            parameter: loaded[f"model{index}"][name]
            for index, chunk in enumerate(state.unwrapped_chunks())
            for name, parameter in chunk.named_parameters()
            if is_float8tensor(parameter)
        }
        with torch.no_grad():
            optimizer_state.follow_weights(state.optimizer, exact)
    state.iteration = run["updates"]
    return run["extra"]


def _fill(
    state: TrainState, folder: Path, run: dict[str, Any], there: dict[str, Any] | None, with_optimizer: bool
) -> dict[str, Any]:
    """Read the tensors, and return them. `there`: what the checkpoint says of its adapters."""
    content = {
        chunk: {name: value for name, value in tensors.items() if not is_new(name, there)}
        for chunk, tensors in _model_content(state).items()
    }
    _check_fit(content, folder)
    if with_optimizer:
        _check_optimizer(run["optimizer"], optimizer_state.kind(state.optimizer), folder)
        with platform.cuda_calls_on_cpu():
            content["optimizer"] = optimizer_state.to_load(state.optimizer, _model_content(state), _metadata(state))
    history = {}
    if fp8_history.keeps_history(state.config):
        with reading(folder):
            stored = fp8_history.stored_in(folder)
        history = _histories(state, functools.partial(fp8_history.to_load, stored=stored))
    with torch.no_grad(), platform.cuda_calls_on_cpu():
        # Else megatron-core 0.19 reads into what is in FP8: the master copies follow rounded numbers, and of the two
        # halves of a gated layer, which are read one after the other, one gets the scale of the other.
        force_all_tensors_to_non_fp8(content)
        with reading(folder):
            loaded = dist_checkpointing.load(content | history, str(folder))
        for index, chunk in enumerate(state.unwrapped_chunks()):
            if history:
                fp8_history.put(chunk, loaded.get(f"fp8_history{index}", {}), state.config)
            missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
            if unexpected or not all(EXTRA in name or is_new(name, there) for name in missing):
                raise RuntimeError(f"the model and what was read for it differ: {missing}, {unexpected}")
        if "optimizer" in content:
            optimizer_state.put(state.optimizer, loaded["optimizer"])
            forget_stored_rates(state.optimizer, state.scheduler)
            state.scheduler.num_steps = 0  # megatron-core adds the stored steps to those already taken
            state.scheduler.load_state_dict(loaded["scheduler"])
            if state.config.fp8_param:
                optimizer_state.write_weights(state.optimizer, state.chunks)
    return loaded


def _metadata(state: TrainState) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": state.groups.pg_collection.dp_cp,
    }


def _model_content(state: TrainState) -> dict[str, Any]:
    """Sharded state of each chunk. Names inside are those of the whole model, so that the number of chunks may
    change. Without extra states: what they say of earlier steps is stored apart (fp8_history.py), and imported
    checkpoints have none.
    """
    metadata = _metadata(state)
    content = {}
    for index, chunk in enumerate(state.unwrapped_chunks()):
        everything = chunk.sharded_state_dict(metadata=metadata)
        content[f"model{index}"] = {name: value for name, value in everything.items() if EXTRA not in name}
    return content


def _histories(state: TrainState, of: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """What FP8 knows of earlier steps, of each chunk."""
    return {
        f"fp8_history{index}": of(chunk, chunk.sharded_state_dict(metadata=_metadata(state)))
        for index, chunk in enumerate(state.unwrapped_chunks())
    }


def _find(state: TrainState, directory: str | Path, iteration: int | None, flag: str) -> Path:
    """The checkpoint's folder, looked up by rank 0 for all, so that ranks cannot disagree."""
    answer: Path | CheckpointError | None = None
    if state.groups.is_main:
        try:
            answer = find(directory, iteration, flag)
        except CheckpointError as error:
            answer = error
    found = broadcast_object(answer, src=0)
    if isinstance(found, CheckpointError):
        found.rank, found.told = 0, not speaks()
        raise found
    return found


def _read_run(folder: Path, flag: str) -> dict[str, Any]:
    with reading(folder):
        common = common_state(folder)
    if "run" not in common:
        raise CheckpointError(
            f"{folder} was not written by this package (it may be a checkpoint of Megatron-LM). Give {flag} a folder "
            "that a run wrote with --save."
        )
    return json.loads(common["run"])


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError) as error:
        raise ResourceError(
            f"The checkpoint {folder} could not be written ({reason_of(error)}); the disk may be full. Make room, and "
            "go on from the last checkpoint that was saved."
        ) from error


def _check_fit(content: dict[str, Any], folder: Path) -> None:
    """Compare the model with what is stored, by name and global shape, before anything is read."""
    with reading(folder):
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for wanted in nested_values(content):
        tensors = nested_values(wanted.build()) if isinstance(wanted, ShardedTensorFactory) else [wanted]
        for tensor in tensors:
            if not isinstance(tensor, ShardedTensor):
                continue
            if tensor.key not in stored:
                raise CheckpointError(
                    f"The checkpoint {folder} has no weight {tensor.key}, which this model needs. It was written by "
                    "another architecture."
                )
            there = tuple(stored[tensor.key].global_shape)
            if there != tuple(tensor.global_shape):
                raise CheckpointError(
                    f"The weight {tensor.key} has shape {tuple(tensor.global_shape)} in this model and {there} in the "
                    f"checkpoint {folder}. "
                    "Use the model configuration that wrote it."
                )


def _check_optimizer(stored: str | None, wanted: str, folder: Path) -> None:
    if stored is None:
        raise CheckpointError(
            f"The checkpoint {folder} holds no optimizer state. Load it with --no-load-optim or --finetune."
        )
    if stored != wanted:
        raise CheckpointError(
            f"The checkpoint {folder} was written by the optimizer '{stored}', and this run uses '{wanted}'. Use the "
            "same, or --no-load-optim."
        )


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """Let SIGTERM wait. A scheduler sends it to the whole job, and the processes that megatron-core writes with inherit
    this; without it they would die in the middle of a save, or before the next one.
    """
    resource_tracker.ensure_running()  # when multiprocessing starts it, it ends such a hold
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
