"""A layout and a model, as a picklable job; its gradients and its step, as tensors of the whole model.

For models with experts, where the ranks of a stage hold different ones, and with activations computed again.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.parallel.test_equivalence import rl_rows, sft_rows
from tests.small_model import whole
from tests.tiny import model_config

EXPERTS = dict(
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
    moe_first_k_dense=1,
    moe_shared_expert_intermediate_size=16,
)
_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Job:
    """What is computed (`stage`: sft or tracerl), of which model, in which layout.

    Attributes:
        parallel: fields of ParallelConfig. sizes: of the model; both as pairs, so that a Job can be compared.
    """

    stage: str = "sft"
    parallel: tuple = ()
    sizes: tuple = tuple(EXPERTS.items())
    float64: bool = False

    @classmethod
    def of(cls, stage: str, parallel: dict, sizes: dict, float64: bool) -> Job:
        return cls(stage, tuple(parallel.items()), tuple(sizes.items()), float64)


def make_state(job: Job, with_optimizer: bool):
    """The TrainState of a job; join its layout first. Collective."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.config.validate import check_model, check_parallel
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.state import TrainState

    parallel = ParallelConfig(**dict(job.parallel))
    groups, model = (
        initialize(parallel, seed=1),
        model_config(**dict(num_layers=4, init_method_std=0.2) | dict(job.sizes)),
    )
    check_model(model)
    check_parallel(parallel, model, groups.world_size)
    config = transformer_config(model, parallel, dtype=torch.float64 if job.float64 else torch.float32)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None):
        return BlockDiffusionModel(
            config, model_shape(model), groups.pg_collection, pre_process, post_process, vp_stage
        )

    optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5) if with_optimizer else None
    return TrainState.build(build, config, optimizer, parallel, groups, 10)


def whole_with_experts(state, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the whole model, from those of all ranks that hold a part. Collective.

    Experts are numbered from 0 on each rank; here they get their numbers within the model.
    """
    from megatron_dlm.parallel.exchange import gather_objects

    collection, config = state.groups.pg_collection, state.config
    others = {name: value for name, value in values.items() if not _EXPERT.fullmatch(name)}
    found = whole(state, others)
    local = (config.num_moe_experts or 0) // state.groups.ep_size
    mine: dict[str, Tensor] = {}
    for name in sorted(values.keys() - others.keys()):  # in one order on all ranks
        before, number, after = _EXPERT.fullmatch(name).groups()
        shards = gather_objects({name: values[name].detach().clone()}, collection.expt_tp)
        parts = [shard[name] for shard in shards]
        expert = f"{before}{int(number) + local * collection.ep.rank()}{after}"
        if "linear_fc1" in name:  # [gate; up], each of them split
            halves = [part.chunk(2, dim=0) for part in parts]
            mine[expert] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        else:
            mine[expert] = torch.cat(parts, dim=1)
    for everyone in gather_objects(gather_objects(mine, collection.ep), state.groups.pp):
        for part in everyone:
            found |= part
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Gradients, or how far weights moved, by name: equal to a part of their norm. Only experts that no token came to,
    few of them, have none.
    """
    assert found.keys() == expected.keys()
    idle = {name for name, tensor in expected.items() if not tensor.norm()}
    assert all(_EXPERT.fullmatch(name) for name in idle) and len(idle) <= len(expected) // 10, idle
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


def begin(job: Job, folder: Path) -> None:
    """Write the weights that all layouts start from."""
    from megatron_dlm.checkpoint.distributed import save

    save(make_state(job, False), folder, 0, {}, with_optimizer=False)


def gradients_of(job: Job, folder: Path):
    """Metrics and whole gradients of the update, float64."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import accumulate_gradients

    state = make_state(dataclasses.replace(job, float64=True), False)
    load(state, folder, with_optimizer=False)
    rows, forward, length = (sft_rows if job.stage == "sft" else rl_rows)(state)
    metrics = accumulate_gradients(state, rows, forward, length)
    gradients = {name: parameter.main_grad for name, parameter in state.named_parameters()}
    return metrics, whole_with_experts(state, gradients), len(rows)


def step_of(job: Job, folder: Path):
    """Metrics, gradient norm, old and new weights of one step, fp32."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import train_step

    state = make_state(dataclasses.replace(job, float64=False), True)
    load(state, folder, with_optimizer=False)
    rows, forward, length = (sft_rows if job.stage == "sft" else rl_rows)(state)
    before = whole_with_experts(state, dict(state.named_parameters()))
    result = train_step(state, rows, forward, length)
    state.gather_parameters()
    return result.metrics, result.grad_norm, before, whole_with_experts(state, dict(state.named_parameters()))
