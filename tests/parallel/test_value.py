"""The value model in every layout, against one process: values, gradients, two updates; and the policy beside it.

All layouts start from one checkpoint of a policy and one of a value model with a random head (under a zero head the
backbone would get no gradient). Gradients in float64, where layouts agree to rounding; two updates of both models in
one fp32 process, the policy with advantages of the value model's old values.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item
from tests.harness import pool
from tests.small_model import whole
from tests.tiny import Words, model_config, vocabulary

LENGTH, UPDATES = 192, 2


@dataclass(frozen=True)
class Job:
    """A layout and a model."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    distributed: bool = False
    full: bool = False
    tied: bool = False


def make(job: Job, float64: bool):
    """The session, the policy and the value model; without optimizers in float64."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.model.value import ValueModel
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from megatron_dlm.training.state import TrainState

    distributed = job.distributed and not float64  # whose ranks have whole gradients of their own shards only
    parallel = ParallelConfig(
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        sequence_parallel=job.sequence_parallel,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=distributed,
        overlap_param_gather=distributed,
    )
    groups = initialize(parallel, seed=1)
    model = model_config(
        None if job.full else 4,
        num_layers=4,
        init_method_std=0.2,
        full_attention=job.full,
        untie_embeddings_and_output_weights=not job.tied,
    )
    session = Session(model, parallel, Words(), groups, vocabulary())
    adam = dict(adam_eps=1e-3, clip_grad=0.5)
    if not float64:
        policy = session.train_state(OptimizerConfig(lr=1e-2, **adam), 10)
        return session, policy, session.value_state(OptimizerConfig(lr=2e-2, **adam), 10)
    states = []
    for kind in (BlockDiffusionModel, ValueModel):
        config = transformer_config(model, parallel, dtype=torch.float64)

        def build(pre_process: bool, post_process: bool, vp_stage: int | None, kind=kind, config=config):
            return kind(config, model_shape(model), groups.pg_collection, pre_process, post_process, vp_stage)

        states.append(TrainState.build(build, config, None, parallel, groups, 10))
    return session, *states


def begin(job: Job, folder: Path, float64: bool) -> None:
    """A policy, and a value model with its backbone and a random head."""
    from megatron_dlm.checkpoint.distributed import save
    from megatron_dlm.training.backbone import copy_backbone

    _, policy, value = make(job, float64)
    copy_backbone(policy, value)
    with torch.no_grad():
        head = value.module.value_head.weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    for name, state in (("policy", policy), ("value", value)):
        save(state, folder / f"{name}{float64}", 0, {}, with_optimizer=False)


def prepare(job: Job, folder: Path, float64: bool):
    """Both models with their weights, and this rank's rows with old values and what is learned from them."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.diffusion.planner import Load, pack
    from megatron_dlm.diffusion.rows import build_row
    from megatron_dlm.rl.gae import learned_steps, outcome_rewards
    from megatron_dlm.rl.value import Rewarded, ValueRow, ValueSettings, token_advantages, values_of

    session, policy, value = make(job, float64)
    load(policy, folder / f"policy{float64}", with_optimizer=False)
    load(value, folder / f"value{float64}", with_optimizer=False)
    groups, settings, rng = session.groups, ValueSettings(0.05, 0.9, 0.8), np.random.default_rng(0)
    traces = [trace for n in range(3) for trace in random_group(3 + n, [2 + n, 9, 5], 4, rng, f"p{n}")]
    items = [trace_item(trace, session.grid) for trace in traces]
    plan = pack([Load(item.group, item.shared_length, item.own_length) for item in items], LENGTH, groups.dp_size, 16)
    rewarded = {}
    for n, trace in enumerate(traces):
        steps, learned = learned_steps(trace, session.grid), np.ones(len(trace.response_ids), dtype=bool)
        rewarded[n] = Rewarded(outcome_rewards(steps, learned, float(np.cos(5.0 * n))), steps, learned)
    rows = [
        build_row([(n, items[n]) for n in members], plan.length, MASK_ID, PAD_ID)
        for members in plan.ranks[groups.dp_rank]
    ]
    old = values_of(value, rows, plan.length)
    assert (old is None) == (groups.pp_rank < groups.pp_size - 1)
    pairs = token_advantages(rows, old, rewarded, settings)
    # Old values at some distance from those of now, so that some are clipped; not on stages without values.
    value_rows = []
    for index, row in enumerate(rows):
        known = torch.zeros(len(row.targets.slot)) if old is None else old[index]
        shift = 0.2 * torch.sin(row.targets.index.double() + row.targets.label.double())
        weight = torch.full((len(known),), 1 / 50, dtype=torch.float64)
        value_rows.append(ValueRow(row, known + shift.to(known), pairs[index][1], weight))
    found = [
        (list(zip(row.targets.response.tolist(), row.targets.index.tolist())), values.tolist(), *map(list, pair))
        for row, values, pair in zip(rows, old or [], pairs)
    ]
    return session, policy, value, value_rows, [advantage for advantage, _ in pairs], plan.length, settings, found


def gradients_of(job: Job, folder: Path):
    """What is read and derived per target, metrics, and whole gradients, float64."""
    from megatron_dlm.rl.value import value_forward
    from megatron_dlm.training.step import accumulate_gradients

    _, _, value, rows, _, length, settings, found = prepare(job, folder, True)
    metrics = accumulate_gradients(value, rows, value_forward(settings), length)
    grads = whole(value, {name: parameter.main_grad for name, parameter in value.named_parameters()})
    numbers = {
        key: np.array([float(old), float(advantage), float(returned)])
        for keys, *columns in found
        for key, old, advantage, returned in zip(keys, *columns)
    }
    return numbers, metrics, grads


def updates_of(job: Job, folder: Path):
    """Metrics and weights of both models after two updates each, in one process, one after the other."""
    from megatron_dlm.model.policy import label_logprobs, policy_scores
    from megatron_dlm.rl.value import update_value
    from megatron_dlm.training.sleep import sleep
    from megatron_dlm.training.step import train_step

    session, policy, value, rows, advantages, length, settings, _ = prepare(job, folder, False)

    def reinforce(pair, model):
        row, advantage = pair

        def loss_fn(logits):
            group = model.module.pg_collection.tp
            logprob = label_logprobs(policy_scores(logits, 1.0, session.vocabulary, group), row.targets.label, group)
            return -(advantage.to(logprob) * logprob).sum() / 50, {}

        return model.module.forward_row(row), loss_fn

    starts = [whole(state, dict(state.named_parameters())) for state in (policy, value)]
    results = []
    pairs = list(zip([row.row for row in rows], advantages))
    for _ in range(UPDATES):
        sleep(policy)
        metrics = update_value(value, [(rows, length)], settings)
        sleep(value)
        step = train_step(policy, pairs, reinforce, length)
        results.append(metrics | {"policy loss": step.metrics["loss"], "policy norm": step.grad_norm})
    ends = []
    for state in (policy, value):
        state.gather_parameters()
        ends.append(whole(state, dict(state.named_parameters())))
    return results, starts, ends


LAYOUTS = {
    "tp2": (2, dict(tp=2)),
    "tp2 sp": (2, dict(tp=2, sequence_parallel=True)),
    "pp2": (2, dict(pp=2)),
    "dp2": (2, dict(distributed=True)),
}
MODELS = {"block": {}, "full attention": dict(full=True), "tied": dict(tied=True)}
# What differs between models is in no layout but these.
SOME = {"block": tuple(LAYOUTS), "full attention": ("tp2 sp", "pp2", "dp2"), "tied": ("pp2",)}
CASES = [(layout, model) for model in MODELS for layout in SOME[model]]
UPDATED = [case for case in CASES if case[1] != "full attention" or case[0] == "dp2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of a model, in float64 (gradients) or fp32 (updates): its checkpoints, and what one process finds."""

    @functools.cache
    def found(model: str, float64: bool):
        folder, job = tmp_path_factory.mktemp("value"), Job(**MODELS[model])
        pool(1).run(begin, job, folder, float64)
        return folder, pool(1).run(gradients_of if float64 else updates_of, job, folder)[0]

    return found


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_values_and_gradients_are_those_of_one_process(alone, layout: str, model: str) -> None:
    world, changes = LAYOUTS[layout]
    folder, (numbers, metrics, gradients) = alone(model, True)
    results = pool(world).run(gradients_of, Job(**changes, **MODELS[model]), folder)
    assert {key for found, _, _ in results for key in found} == set(numbers)
    assert 0 < metrics["clipfrac"] < metrics["targets"] == len(numbers) == 51
    for found, found_metrics, found_gradients in results:
        for key, row in found.items():
            np.testing.assert_allclose(row, numbers[key], rtol=1e-9, atol=1e-9)
        for name in metrics:
            assert found_metrics[name] == pytest.approx(metrics[name], rel=1e-9, abs=1e-11), name
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert gradient.norm() > 0, name
            assert (found_gradients[name] - gradient).norm() < 1e-10 * gradient.norm(), name


@pytest.mark.parametrize(("layout", "model"), UPDATED)
def test_two_updates_of_both_models_are_those_of_one_process(alone, layout: str, model: str) -> None:
    """The models take turns: each sleeps while the other is updated."""
    world, changes = LAYOUTS[layout]
    folder, (expected, starts, ends) = alone(model, False)
    for results, before, after in pool(world).run(updates_of, Job(**changes, **MODELS[model]), folder):
        for found, metrics in zip(results, expected, strict=True):
            for name, number in metrics.items():
                assert found[name] == pytest.approx(number, rel=2e-4, abs=2e-5), name
        for state in range(2):
            for name, weight in ends[state].items():
                moved = (weight - starts[state][name]).norm()
                assert torch.equal(before[state][name], starts[state][name]) and moved > 0, name
                assert (after[state][name] - weight).norm() < 2e-4 * moved, name
