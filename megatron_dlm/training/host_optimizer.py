"""An optimizer whose master weights and moments are in host memory: megatron-core's HybridDeviceOptimizer.

It is built over the bf16 shards of the distributed optimizer. Each update copies their gradients to the host, where
torch's Adam updates the fp32 master weights, and copies the new weights back, rounded. What is not offloaded (a part,
by --optimizer-offload-fraction) it does the same with on the device. Numbers are those of the optimizer on the device,
up to the rounding of another kernel; a checkpoint of one is a checkpoint of the other.

Invariants (tests/training/test_host_optimizer.py): that, and a run that stops, sleeps or forgets its moments goes on as
it would on the device.

Only this combination is used. In others megatron-core 0.16.1 builds it and gets it wrong: without the distributed
optimizer, or over fp32 shards, it either fails or does not follow weights that are loaded without an optimizer, and the
first update brings the old ones back.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from torch import Tensor

from megatron_dlm import platform

MASTER = "master_param"
"""Name under which the state of a parameter holds its master weight, which is no moment."""
_OWN = frozenset(
    {
        "cpu_optimizer_cls",
        "gpu_optimizer_cls",
        "fused",
        "offload_fraction",
        "overlap_cpu_optimizer_d2h_h2d",
        "param_update_in_fp32",
        "pin_cpu_grads",
        "pin_cpu_params",
    }
)


def keep_on_host(config: MegatronOptimizerConfig) -> None:
    """Make a configuration that asks for offload one that works: the inner optimizer gets the bf16 shards and the
    gradients beside them. (megatron-core sets this through a switch that it allows with Transformer Engine only, which
    takes no part in it.)
    """
    config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    config.store_param_remainders = False
    config.pin_cpu_grads = config.pin_cpu_params = platform.is_cuda()


def is_on_host(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether (a part of) an inner optimizer is in host memory."""
    return isinstance(optimizer, HybridDeviceOptimizer)


def device_masters(optimizer: HybridDeviceOptimizer) -> list[Tensor]:
    """The master weights that were not offloaded."""
    offloaded = optimizer.gpu_params_map_cpu_copy
    return [master for parameter, master in optimizer.param_to_fp32_param.items() if parameter not in offloaded]


def make_state(optimizer: HybridDeviceOptimizer) -> None:
    """Give every parameter the state that it has before the first update, where it has none. (megatron-core would take
    an update with random gradients, which moves the weights.)
    """
    for part in optimizer.sub_optimizers:
        for group in part.param_groups:
            for parameter in group["params"]:
                state = part.state[parameter]
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter)
    optimizer._sync_sub_optimizers_state_to_hdo()


def settings(optimizer: HybridDeviceOptimizer) -> list[dict[str, Any]]:
    """What the parameter groups say about where and how they are updated, not about the update."""
    return [{name: group[name] for name in _OWN if name in group} for group in optimizer.param_groups]


def take_settings(optimizer: HybridDeviceOptimizer, kept: list[dict[str, Any]]) -> None:
    """Take them back after loading groups that say otherwise, or nothing."""
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
    optimizer._sync_hdo_param_groups_to_sub_optimizers()


def without_settings(stored: Any) -> Any:
    """Leave them out of what is stored (in place): among them are classes, which no checkpoint should name."""
    if isinstance(stored, ShardedObject):
        without_settings(stored.data)
    elif isinstance(stored, dict):
        for name, value in stored.items():
            if name == "param_groups" and isinstance(value, list):
                for group in value:
                    for own in _OWN & group.keys():
                        del group[own]
            else:
                without_settings(value)
    elif isinstance(stored, list):
        for value in stored:
            without_settings(value)
    return stored


def separate_steps(optimizer: HybridDeviceOptimizer) -> None:
    """Give every parameter a count of its own: loading makes them share one."""
    for part in optimizer.sub_optimizers:
        for state in part.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
    optimizer._sync_sub_optimizers_state_to_hdo()
