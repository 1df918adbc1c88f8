"""What a checkpoint stores of an optimizer, and how it gets back.

megatron-core's own routines do the work. With torch's optimizers (no Transformer Engine, no Apex) megatron-core 0.16.1
gets three things wrong, which are set right here, around its calls and without changing it:
  - it cannot describe an optimizer that has not stepped yet: its state is made first, as zeros at step 0;
  - loading the distributed optimizer asks for a stored `step` per parameter, which is not stored: the present one is
    passed through (the other optimizers do not store a step of 0: it is put back);
  - one `step` tensor is then shared by all parameters, and Adam, which counts in place, would count once per parameter:
    each gets its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megatron_dlm.training import host_optimizer
from megatron_dlm.training.state import gather_now

_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")


def kind(optimizer: MegatronOptimizer) -> str:
    """A name that says which optimizers can read each other's state: the update rule, "distributed" or not, "mixed" if
    it has fp32 masters apart, "expert-parallel" if experts have an optimizer of their own."""
    first = _parts(optimizer)[0]
    distributed = isinstance(first, DistributedOptimizer)
    mixed = not distributed and first.config.bf16
    return " ".join(
        word
        for word, holds in (
            ("expert-parallel", len(_parts(optimizer)) > 1),
            ("distributed", distributed),
            ("mixed", mixed),
            (first.config.optimizer, True),
        )
        if holds
    )


def to_save(optimizer: MegatronOptimizer, model: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """Sharded state for dist_checkpointing.save; `model` is the sharded state of the same chunks."""
    _make_state(optimizer)
    stored = optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
    return host_optimizer.without_settings(stored) if _host_parts(optimizer) else stored


def to_load(optimizer: MegatronOptimizer, model: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """The same as a template for dist_checkpointing.load."""
    _make_state(optimizer)
    template = optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
    _separate_steps(optimizer)
    return template


def put(optimizer: MegatronOptimizer, loaded: Any) -> None:
    """Put a loaded state into the optimizer."""
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        stored = loaded if len(parts) == 1 else loaded[index]
        stored = stored.get("optimizer", stored)
        _take_rates(stored.get("param_groups", []), part)
        if part in _torch_parts(optimizer) and not isinstance(part, DistributedOptimizer):
            if part.config.optimizer == "adam" and stored["state"]:
                stored["state"].setdefault("common_step", torch.zeros((), dtype=torch.float32))
    kept = [(part.optimizer, host_optimizer.settings(part.optimizer)) for part in _host_parts(optimizer)]
    with _steps_passed_through(optimizer):
        optimizer.load_state_dict(loaded)
    for inner, settings in kept:
        host_optimizer.take_settings(inner, settings)
    _make_state(optimizer)
    _separate_steps(optimizer)


def follow_weights(optimizer: MegatronOptimizer, exact: Mapping[nn.Parameter, Tensor] | None = None) -> None:
    """Let the fp32 master copies follow the weights, which have changed. Those of weights that are kept in FP8 follow
    `exact`, what these were rounded from; without it they stay as they are.
    """
    kept = []
    for part in _parts(optimizer):
        if not isinstance(part, DistributedOptimizer) or part.is_stub_optimizer:
            continue
        for weights, masters in zip(part.model_float16_groups, part.shard_fp32_from_float16_groups):
            for weight, master in zip(weights, masters):
                if is_float8tensor(weight):
                    place = part._get_model_param_range_map(weight)["param"]
                    source = (
                        master.to("cpu", copy=True)
                        if exact is None
                        else exact[weight].view(-1)[place.start : place.end]
                    )
                    kept.append((master, source))
    optimizer.reload_model_params()
    for master, source in kept:
        master.copy_(source)


def write_weights(optimizer: MegatronOptimizer, chunks: list[DistributedDataParallel]) -> None:
    """Let the weights follow the master weights, as after a step. Weights in FP8 are stored in another type, from which
    they come back with other scales. Collective.
    """
    for part in _parts(optimizer):
        part._copy_main_params_to_model_params()
    for chunk in chunks:
        gather_now(chunk)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _torch_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Those that drive one of torch's optimizers."""
    return [
        part
        for part in _parts(optimizer)
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD))
    ]


def _host_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Those whose state is in host memory."""
    return [part for part in _parts(optimizer) if host_optimizer.is_on_host(part.optimizer)]


def _take_rates(stored: list[dict[str, Any]], part: MegatronOptimizer) -> None:
    """Give stored groups of parameters the bounds of today's rates, which are the same for all groups. Newer releases
    than 0.16 tell groups apart by them, too, and would not find those of a run that goes on with other ones.
    """
    ours = part.optimizer.param_groups[0] if part.optimizer is not None and part.optimizer.param_groups else {}
    for group in stored:
        group.update((name, ours[name]) for name in _RATES if name in ours)


def _make_state(optimizer: MegatronOptimizer) -> None:
    for part in _host_parts(optimizer):
        host_optimizer.make_state(part.optimizer)
    for part in _torch_parts(optimizer):
        part.init_state_fn = part.init_state_fn or (lambda *_: None)  # megatron-core calls it unasked; SGD has none
        momentum = isinstance(part.optimizer, torch.optim.SGD)
        for group in part.optimizer.param_groups:
            names = (("momentum_buffer",) if group["momentum"] else ()) if momentum else ("exp_avg", "exp_avg_sq")
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not momentum:
                    state.setdefault("step", torch.zeros((), dtype=torch.float32))
                for name in names:
                    if state.get(name) is None:
                        state[name] = torch.zeros_like(parameter)


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    for part in _host_parts(optimizer):
        host_optimizer.separate_steps(part.optimizer)
    for part in _torch_parts(optimizer):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


@contextlib.contextmanager
def _steps_passed_through(optimizer: MegatronOptimizer) -> Iterator[None]:
    patched = [part for part in _torch_parts(optimizer) if isinstance(part, DistributedOptimizer)]
    for part in patched:
        original = part._set_main_param_and_optimizer_states

        def with_step(model_param: Any, tensors: dict[str, Any], part: Any = part, original: Any = original) -> None:
            group, place = part.model_param_group_index_map[model_param]
            main = part.optimizer.param_groups[group]["params"][place]
            original(model_param, {"step": part.optimizer.state[main]["step"], **tensors})

        part._set_main_param_and_optimizer_states = with_step
    try:
        yield
    finally:
        for part in patched:
            del part._set_main_param_and_optimizer_states
