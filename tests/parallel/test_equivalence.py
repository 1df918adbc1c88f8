"""One SFT step and one TraceRL step on recorded traces, in every layout, against one process.

All layouts start from one checkpoint. First the gradients of the update's loss in float64, where layouts agree to
rounding; then a whole fp32 step: loss, gradient norm and the new weights (Adam with a large epsilon, because its first
step turns gradient noise into whole steps).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group
from tests.harness import pool
from tests.small_model import whole
from tests.tiny import model_config, vocabulary


@dataclass(frozen=True)
class Job:
    """A layout and what is computed in it."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    distributed: bool = False
    float64: bool = False
    stage: str = "sft"


def make_state(job: Job, with_optimizer: bool):
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.state import TrainState

    parallel = ParallelConfig(
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        sequence_parallel=job.sequence_parallel,
        use_distributed_optimizer=job.distributed,
    )
    groups, model = initialize(parallel, seed=1), model_config(num_layers=4, init_method_std=0.2)
    config = transformer_config(model, parallel, dtype=torch.float64 if job.float64 else torch.float32)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None):
        return BlockDiffusionModel(
            config, model_shape(model), groups.pg_collection, pre_process, post_process, vp_stage
        )

    optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5) if with_optimizer else None
    return TrainState.build(build, config, optimizer, parallel, groups, 10)


def sft_rows(state, multiple: int = 16):
    from megatron_dlm.config.sft import SFTConfig
    from megatron_dlm.data.sft_data import Sample
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.diffusion.planner import Load, pack
    from megatron_dlm.diffusion.rows import build_row
    from megatron_dlm.sft.objective import sft_forward
    from megatron_dlm.sft.updates import sft_items

    rng = np.random.default_rng(0)
    samples = [
        Sample(f"s{n}", tuple(rng.integers(0, 50, 1 + n).tolist()), tuple(rng.integers(0, 50, 5 + n % 4).tolist()))
        for n in range(7)
    ]
    drawn = sft_items(samples, 3, 5, Grid(4), SFTConfig(max_loss_weight=4.0), PAD_ID)
    loads = [Load(item.group, item.shared_length, item.own_length) for item in drawn.items]
    plan = pack(loads, max(64, multiple), state.groups.dp_size, multiple)
    rows = [
        build_row([(i, drawn.items[i]) for i in members], plan.length, MASK_ID, PAD_ID)
        for members in plan.ranks[state.groups.dp_rank]
    ]
    return rows, sft_forward(vocabulary(), drawn.num_predicted), plan.length


def rl_rows(state):
    """The path of the trainer: every trace lies on one rank, and moves to those that train on it."""
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.rl.exchange import gather_graded
    from megatron_dlm.rl.methods import TARGET, counts_of, replay
    from megatron_dlm.rl.objective import PolicyObjective
    from megatron_dlm.rl.rows import build_rows
    from megatron_dlm.rl.update import UpdateSettings, fetch, plan_updates, policy_forward, with_old_logprobs
    from tests.rl.records import record_of

    groups, rng = state.groups, np.random.default_rng(0)
    settings = UpdateSettings(
        objective=PolicyObjective(0.2, 0.3, 0.1),
        temperature=0.8,
        aggregation="constant",
        longest=12,
        num_updates=1,
        max_tokens_per_row=96,
        states=replay(Grid(4)),
    )
    traces = [trace for n in range(4) for trace in random_group(3 + n, [2 + n, 7, 5 - n], 4, rng, f"p{n}")]
    mine = traces[groups.rank :: groups.world_size]
    records = []
    for index, trace in enumerate(mine):
        item = settings.states.item(trace, 0)
        records.append(record_of(trace, index, item, counts_of(item, TARGET), groups.rank))
    advantages = {(trace.prompt_key, trace.sample): float(np.cos(5.0 * n)) for n, trace in enumerate(traces)}
    updates = plan_updates(gather_graded(records), settings, groups, 11)
    ((members, plan),), (fetched,) = updates, fetch(updates, mine, groups)
    rows = build_rows(members, plan, fetched, advantages, settings, groups.dp_rank, MASK_ID, PAD_ID)
    rows = with_old_logprobs(state, rows, plan.length, vocabulary(), settings)
    # An old policy at some distance, so that ratios differ from 1. Stages without a loss know no old log-probabilities.
    shift = lambda row: 0.4 * torch.sin(row.row.targets.index.double() + row.row.targets.label.double())
    rows = [
        (
            row
            if row.old_logprob is None
            else dataclasses.replace(row, old_logprob=row.old_logprob + shift(row).to(row.old_logprob))
        )
        for row in rows
    ]
    return rows, policy_forward(vocabulary(), settings), plan.length


def begin(job: Job, folder: Path) -> None:
    from megatron_dlm.checkpoint.distributed import save

    save(make_state(job, False), folder, 0, {}, with_optimizer=False)


def gradients_of(job: Job, folder: Path):
    """Metrics and whole gradients of the update, float64."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import accumulate_gradients

    state = make_state(job, False)
    load(state, folder, with_optimizer=False)
    rows, forward, length = (sft_rows if job.stage == "sft" else rl_rows)(state)
    metrics = accumulate_gradients(state, rows, forward, length)
    return metrics, whole(state, {name: parameter.main_grad for name, parameter in state.named_parameters()}), len(rows)


def step_of(job: Job, folder: Path):
    """Metrics, gradient norm and new weights after one step, fp32."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import train_step

    state = make_state(job, True)
    load(state, folder, with_optimizer=False)
    rows, forward, length = (sft_rows if job.stage == "sft" else rl_rows)(state)
    before = whole(state, dict(state.named_parameters()))
    result = train_step(state, rows, forward, length)
    state.gather_parameters()
    return result.metrics, result.grad_norm, before, whole(state, dict(state.named_parameters()))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[bool, Path]:
    """By precision."""
    folders = {}
    for float64 in (True, False):
        folders[float64] = tmp_path_factory.mktemp("float64" if float64 else "float32")
        pool(1).run(begin, Job(float64=float64), folders[float64])
    return folders


@pytest.fixture(scope="module")
def alone(checkpoints) -> dict:
    """One process: gradients and step of both stages."""
    found = {}
    for stage in ("sft", "tracerl"):
        found["gradients", stage] = pool(1).run(gradients_of, Job(stage=stage, float64=True), checkpoints[True])[0]
        found["step", stage] = pool(1).run(step_of, Job(stage=stage), checkpoints[False])[0]
    return found


LAYOUTS = {
    "tp2": (2, dict(tp=2)),
    "pp2": (2, dict(pp=2)),
    "dp2": (2, dict()),
    "tp2 sp": (2, dict(tp=2, sequence_parallel=True)),
    "tp2 pp2": (4, dict(tp=2, pp=2)),
}


@pytest.mark.parametrize("stage", ["sft", "tracerl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(checkpoints, alone, layout: str, stage: str) -> None:
    world, changes = LAYOUTS[layout]
    metrics, expected, count = alone["gradients", stage]
    assert count > 1
    for found_metrics, found, _ in pool(world).run(
        gradients_of, Job(stage=stage, float64=True, **changes), checkpoints[True]
    ):
        for name in metrics:
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-9, abs=1e-12), name
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() < 1e-10 * gradient.norm(), name


# The distributed optimizer where it has somebody to share with, and under all of tensor and pipeline parallelism.
OPTIMIZERS = [(layout, False) for layout in LAYOUTS] + [("dp2", True), ("tp2 pp2", True)]


@pytest.mark.parametrize("stage", ["sft", "tracerl"])
@pytest.mark.parametrize(("layout", "distributed"), OPTIMIZERS)
def test_a_step_is_that_of_one_process(checkpoints, alone, layout: str, distributed: bool, stage: str) -> None:
    world, changes = LAYOUTS[layout]
    metrics, norm, start, expected = alone["step", stage]
    for found_metrics, found_norm, before, after in pool(world).run(
        step_of, Job(stage=stage, distributed=distributed, **changes), checkpoints[False]
    ):
        for name in metrics:
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
        assert found_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert found_norm == pytest.approx(norm, rel=1e-5)
        for name, weight in expected.items():
            moved = weight - start[name]
            assert torch.equal(before[name], start[name]) and moved.norm() > 0, name
            assert (after[name] - weight).norm() < 1e-4 * moved.norm(), name
