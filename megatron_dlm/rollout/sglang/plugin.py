"""What SGLang loads through the entry point `sglang.srt.plugins`, in each of its processes.

It adds the algorithm to the table of algorithms, and configurations of models (configs.py), and hangs three hooks:
  - the mask token is the one of the algorithm's settings, not the one that SGLang's table has for the architecture;
  - before a pass each request is given the state of its block;
  - before a result is processed, finished blocks are taken down. They leave in `meta_info`, whose lists SGLang cuts to
    the length of the response: so a block stands whole at its first response token, and None at the others.

These are no documented interfaces, so the version and the targets are looked at first. SGLang only logs what a plugin
raises: `check_targets` is also called by the child's main program, where it is told.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_dlm.rollout.sglang.algorithm import NAME, make_algorithm, state_of
from megatron_dlm.rollout.sglang.denoise import BlockState
from megatron_dlm.rollout.sglang.wire import KEY

OLDEST = (0, 5, 23)
_CONFIG = "sglang.srt.dllm.config.DllmConfig.from_server_args"
_FORWARD = "sglang.srt.managers.tp_worker.TpModelWorker._forward_batch_generation_dllm"
_RESULT = "sglang.srt.dllm.mixin.scheduler.SchedulerDllmMixin.process_batch_result_dllm"


def register() -> None:
    """The entry point."""
    check_version()
    from sglang.srt.dllm import algorithm as algorithms
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from megatron_dlm.rollout.sglang import configs

    algorithms.algo_name_to_cls[NAME] = make_algorithm()
    configs.register()
    HookRegistry.register(_CONFIG, use_own_mask, HookType.AFTER)
    HookRegistry.register(_FORWARD, give_states, HookType.BEFORE)
    HookRegistry.register(_RESULT, take_blocks, HookType.BEFORE)


def parse_version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.5.23.post1 is (0, 5, 23)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_version() -> None:
    """
    Raises:
        RuntimeError: SGLang is absent or too old.
    """
    needed = ".".join(map(str, OLDEST))
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise RuntimeError(f"SGLang is not installed in this interpreter. Install sglang>={needed} in it.") from None
    if parse_version(found) < OLDEST:
        raise RuntimeError(f"SGLang {found} is too old for this package. Install sglang>={needed}.")


def check_targets() -> None:
    """
    Raises:
        RuntimeError: this SGLang lacks what the plugin hangs on.
    """
    check_version()
    for target in (_CONFIG, _FORWARD, _RESULT):
        module, owner, name = target.rsplit(".", 2)
        if not hasattr(getattr(importlib.import_module(module), owner, None), name):
            raise RuntimeError(
                f"SGLang {version('sglang')} has no {owner}.{name} for the plugin of this package to hang on. Install "
                f"sglang=={'.'.join(map(str, OLDEST))}."
            )
    algorithms = importlib.import_module("sglang.srt.dllm.algorithm")
    if NAME not in algorithms.algo_name_to_cls:
        raise RuntimeError(
            f"SGLang did not load the plugin of this package (its algorithm {NAME} is missing). Leave SGLANG_PLUGINS "
            "unset, or name megatron_dlm in it."
        )


def use_own_mask(config: Any, *_: Any, **__: Any) -> Any:
    """After DllmConfig.from_server_args."""
    if config is not None and config.algorithm == NAME:
        config.mask_id = int(config.algorithm_config["mask_id"])
    return config


def give_states(worker: Any, forward_batch: Any, batch: Any = None, *_: Any, **__: Any) -> None:
    """Before TpModelWorker._forward_batch_generation_dllm."""
    algorithm = worker.dllm_algorithm
    if batch is None or type(algorithm).__name__ != NAME:
        return
    for request in batch.reqs:
        request.dllm_algo_state = state_of(request, algorithm.block_size)


def take_blocks(scheduler: Any, batch: Any, result: Any, *_: Any, **__: Any) -> None:
    """Before SchedulerDllmMixin.process_batch_result_dllm."""
    finished, states = result.accept_length_per_req_cpu, result.dllm_algo_state
    if not finished or states is None:
        return
    for request, length, state, ids in zip(batch.reqs, finished, states, result.next_token_ids):
        new = min(request.extend_end - len(request.origin_input_ids), len(ids))
        if not length or new <= 0 or not isinstance(state, BlockState):
            continue  # unfinished, or a block of the prompt
        request.megatron_dlm_taken = state.steps_taken
        if request.customized_info is None:
            request.customized_info = {}
        block = state.finished(ids).to_wire()
        request.customized_info.setdefault(KEY, []).extend([block] + [None] * (new - 1))
