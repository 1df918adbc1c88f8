"""Every layout of the training commands against one process, from one checkpoint: SFT, TraceRL and a value model, in
dense models and in mixtures of experts.

In float64 the gradients of an update's loss, where layouts agree to rounding; then a whole fp32 update of each kind:
loss, gradient norm and new weights (Adam with a large epsilon, because its first step turns gradient noise into whole
steps).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import pool
from tests.tiny import Words, model_config, sampler_of, vocabulary

EXPERTS = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24)
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP, ETP, VPP = (
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
)
SP, DISTRIBUTED = dict(sequence_parallel=True), dict(use_distributed_optimizer=True)
RECOMPUTED = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
OVERLAP = dict(DISTRIBUTED, overlap_grad_reduce=True, overlap_param_gather=True)


@dataclass(frozen=True)
class Layout:
    """A number of processes, and how a model is spread over them."""

    world: int
    parallel: dict = field(default_factory=dict)


DENSE = {
    "cp2": Layout(2, {CP: 2} | DISTRIBUTED),
    "cp4": Layout(4, {CP: 4}),
    "cp2 recomputed": Layout(2, {CP: 2} | RECOMPUTED),
    "pp2 vpp2 recomputed": Layout(2, {PP: 2, VPP: 2} | RECOMPUTED),
    "cp2 dp2 overlapped": Layout(4, {CP: 2} | OVERLAP),
    "cp2 tp2 sp": Layout(4, {CP: 2, TP: 2} | SP),
    "cp2 pp2": Layout(4, {CP: 2, PP: 2}),
    "pp2 vpp2": Layout(2, {PP: 2, VPP: 2}),
    "pp2 vpp2 dp2 overlapped": Layout(4, {PP: 2, VPP: 2} | OVERLAP),
    "tp2 sp pp2 vpp2": Layout(4, {TP: 2, PP: 2, VPP: 2} | SP),
    "tp2 sp dp2": Layout(4, {TP: 2} | SP | DISTRIBUTED),
    "tp2 sp cp2 pp2 vpp2": Layout(8, {TP: 2, CP: 2, PP: 2, VPP: 2} | SP),
}
SPARSE = {
    "ep2": Layout(2, {EP: 2} | DISTRIBUTED),
    "tp2 sp": Layout(2, {TP: 2} | SP),
    "ep2 of tp2 sp": Layout(2, {EP: 2, TP: 2, ETP: 1} | SP),
    "ep2 pp2 vpp2": Layout(4, {EP: 2, PP: 2, VPP: 2}),
    "ep2 tp2 sp, experts whole": Layout(4, {EP: 2, TP: 2, ETP: 1} | SP),
    "ep2 tp2 sp, experts split": Layout(4, {EP: 2, TP: 2, ETP: 2} | SP | DISTRIBUTED),
    "ep2 cp2": Layout(2, {EP: 2, CP: 2}),
    "ep4 tp2 sp cp2 pp2, experts whole": Layout(8, {EP: 4, TP: 2, CP: 2, PP: 2, ETP: 1} | SP),
}
LAYOUTS = {False: DENSE, True: SPARSE}


def session_of(parallel: dict, sparse: bool):
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.config.validate import check_model, check_parallel
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session

    model = model_config(num_layers=4, init_method_std=0.2, **(EXPERTS if sparse else {}))
    config = ParallelConfig(**parallel)
    check_model(model)
    groups = initialize(config, seed=1)
    check_parallel(config, model, groups.world_size)
    return Session(model, config, Words(), groups, vocabulary())


def states_of(session, float64: bool):
    """Policy and value model; without optimizers in float64."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.model.value import ValueModel
    from megatron_dlm.training.state import TrainState

    if not float64:
        optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5)
        return [session.train_state(optimizer, 10), session.value_state(optimizer, 10)]
    states = []
    # In float64 there is no optimizer, and whoever has a shard of the gradients only has no whole one.
    plain = dataclasses.replace(
        session.parallel, use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False
    )
    for kind in (BlockDiffusionModel, ValueModel):
        config = transformer_config(session.model, plain, dtype=torch.float64)

        def build(pre_process: bool, post_process: bool, vp_stage: int | None, kind=kind, config=config):
            shape, groups = model_shape(session.model), session.groups.pg_collection
            return kind(config, shape, groups, pre_process, post_process, vp_stage)

        states.append(TrainState.build(build, config, None, plain, session.groups, 10))
    return states


def begin(folder: Path, sparse: bool) -> None:
    from megatron_dlm.checkpoint.distributed import save
    from tests.tiny import disturb

    session = session_of({}, sparse)
    for float64 in (True, False):
        states = states_of(session, float64)
        for seed, (name, state) in enumerate(zip(("policy", "value"), states)):
            disturb(state.module, seed)
            save(state, folder / f"{name} {float64}", 0, {}, with_optimizer=False)


def sft_update(session, policy):
    """This rank's rows of an update, their length, and what is computed on them."""
    from megatron_dlm.config.sft import SFTConfig
    from megatron_dlm.data.sft_data import Sample
    from megatron_dlm.sft.trainer import SFTTrainer

    rng = np.random.default_rng(0)
    samples = [
        Sample(f"s{n}", tuple(rng.integers(0, 50, 1 + n).tolist()), tuple(rng.integers(0, 50, 9 + n % 7).tolist()))
        for n in range(12)
    ]
    sft = SFTConfig(global_batch_size=12, max_tokens_per_row=64)
    trainer = SFTTrainer(session, policy, sampler_of(samples, 5), sft, 5)
    update = trainer.take()
    return update.rows, update.length, trainer.forward_step(update)


def rl_update(session, policy, value):
    """An update of both models: the policy's rows, the value model's, their length, and the settings."""
    from megatron_dlm.config.rl import RLConfig
    from megatron_dlm.config.value import ValueConfig
    from megatron_dlm.rl.exchange import gather_graded
    from megatron_dlm.rl.learner import Learner, Models
    from megatron_dlm.rl.update import with_old_logprobs
    from tests.rl.learning import SEED, advantages_of, records_of, responses, settings_of

    config = RLConfig(kl_loss_coef=0.1, entropy_coef=0.01)
    settings = dataclasses.replace(settings_of(config, 4, 96), loss_chunk_size=session.parallel.loss_chunk_size)
    learner = Learner(session, Models(policy, value), ValueConfig(gamma=0.9, gae_lambda=0.7), SEED)
    traces, groups = responses(4), session.groups
    mine = traces[groups.rank :: groups.world_size]
    records = gather_graded(records_of(mine, settings, groups.rank))
    (update,) = learner.prepare(records, advantages_of(traces), mine, settings)
    # An old policy at some distance, so that ratios differ from 1. Stages without a loss know no old log-probabilities.
    shift = lambda row: 0.4 * torch.sin(row.row.targets.index.double() + row.row.targets.label.double())
    rows = [
        row if row.old_logprob is None else dataclasses.replace(row, old_logprob=row.old_logprob + shift(row))
        for row in with_old_logprobs(policy, update.rows, update.length, vocabulary(), settings)
    ]
    return rows, update.value_rows, update.length, settings


def gathered(state, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the whole model, put together from all ranks. `values` has the names of state.named_parameters().

    All ranks that hold the same shard must hold the same numbers.
    """
    from megatron_dlm.parallel.exchange import gather_objects
    from megatron_dlm.rollout.reshard_plan import canonical, is_expert

    groups, experts = state.groups.pg_collection, state.config.num_moe_experts
    first = 0 if experts is None else groups.ep.rank() * (experts // groups.ep.size())
    parameters, mine = dict(state.named_parameters()), {}
    for name, value in values.items():
        known_as = canonical(name, first)
        group = groups.expt_tp if is_expert(known_as) else groups.tp
        sharded = getattr(parameters[name], "tensor_model_parallel", False) and group.size() > 1
        dim = parameters[name].partition_dim if sharded else None
        content = (value.detach().clone().contiguous(), dim, "linear_fc1" in name)
        mine[known_as, group.rank() if sharded else 0] = content
    shards: dict[str, dict[int, tuple]] = {}
    for held in gather_objects(mine):
        for (name, place), content in held.items():
            other = shards.setdefault(name, {}).setdefault(place, content)
            assert (other[0] - content[0]).norm() <= 1e-12 * content[0].norm(), f"{name} differs between ranks"
    return {name: joined([found[place] for place in sorted(found)]) for name, found in shards.items()}


def joined(shards: list[tuple]) -> torch.Tensor:
    tensors, (_, dim, gated) = [shard[0] for shard in shards], shards[0]
    if dim is None:
        return tensors[0]
    if not gated:
        return torch.cat(tensors, dim)
    halves = [tensor.chunk(2) for tensor in tensors]  # gate and up are sharded one by one
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves])


def results_of(parallel: dict, sparse: bool, folder: Path) -> dict:
    """Gradients and updates of all three kinds in one layout: each as metrics, tensors of the whole model, and for
    updates also the gradient norm and the weights before."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.rl.update import policy_forward
    from megatron_dlm.rl.value import ValueSettings, value_forward
    from megatron_dlm.training.step import accumulate_gradients, train_step

    found: dict = {}
    session = session_of(parallel, sparse)
    for float64 in (True, False):
        for kind in ("sft", "tracerl", "value"):
            policy, value = states_of(session, float64)
            load(policy, folder / f"policy {float64}", with_optimizer=False)
            load(value, folder / f"value {float64}", with_optimizer=False)
            state = value if kind == "value" else policy
            if kind == "sft":
                rows, length, forward = sft_update(session, policy)
            else:
                rows, value_rows, length, settings = rl_update(session, policy, value)
                forward = policy_forward(vocabulary(), settings)
                if kind == "value":
                    rows, forward = value_rows, value_forward(ValueSettings(0.05, 0.9, 0.7))
            if float64:
                metrics = accumulate_gradients(state, rows, forward, length)
                grads = {name: parameter.main_grad for name, parameter in state.named_parameters()}
                found[kind, "gradients"] = metrics, gathered(state, grads)
                continue
            before = gathered(state, dict(state.named_parameters()))
            result = train_step(state, rows, forward, length)
            state.gather_parameters()
            after = gathered(state, dict(state.named_parameters()))
            found[kind, "update"] = result.metrics, after, result.grad_norm, before
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict[bool, Path]:
    """Checkpoints of dense models and of mixtures."""
    folders = {}
    for sparse in (False, True):
        folders[sparse] = tmp_path_factory.mktemp("sparse" if sparse else "dense")
        pool(1).run(begin, folders[sparse], sparse)
    return folders


@pytest.fixture(scope="module")
def alone(start) -> dict[bool, dict]:
    return {sparse: pool(1).run(results_of, {}, sparse, start[sparse])[0] for sparse in (False, True)}


@pytest.mark.parametrize(
    ("sparse", "name"), [(sparse, name) for sparse in LAYOUTS for name in LAYOUTS[sparse]], ids=lambda x: str(x)
)
def test_a_layout_learns_what_one_process_learns(start, alone, sparse: bool, name: str) -> None:
    layout = LAYOUTS[sparse][name]
    results = pool(layout.world).run(results_of, layout.parallel, sparse, start[sparse])
    for kind in ("sft", "tracerl", "value"):
        metrics, expected = alone[sparse][kind, "gradients"]
        for result in results:
            found_metrics, found = result[kind, "gradients"]
            for key, number in metrics.items():
                assert found_metrics[key] == pytest.approx(number, rel=1e-9, abs=1e-11), (kind, key)
            for key, gradient in expected.items():
                assert gradient.norm() > 0, (kind, key)
            check(kind, found, expected, 1e-7 if sparse else 1e-10)  # routers take their softmax in fp32
        metrics, expected, norm, start_of = alone[sparse][kind, "update"]
        for result in results:
            found_metrics, found, found_norm, before = result[kind, "update"]
            for key, number in metrics.items():
                assert found_metrics[key] == pytest.approx(number, rel=1e-4, abs=1e-4), (kind, key)
            assert found_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5, abs=1e-6)
            assert found_norm == pytest.approx(norm, rel=1e-5)
            check(kind, before, start_of, 0.0)
            moved = {key: after - start_of[key] for key, after in expected.items()}
            check(kind, {key: found[key] - start_of[key] for key in found}, moved, 1e-4)


def check(kind: str, found: dict, expected: dict, bound: float) -> None:
    """Tensors are equal up to `bound`, of the norm of what is expected."""
    assert found.keys() == expected.keys(), kind
    for key, tensor in found.items():
        assert (tensor - expected[key]).norm() <= bound * expected[key].norm(), (kind, key)
