"""Whole RL steps with a value model, a frozen reference and a teacher in every layout, against one process.

The models take turns in the memory (offload), and the distributed optimizer has its shards where data parallelism
allows it. Layouts agree to the rounding of fp32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import pool

FULL = dict(full_attention=True, block_size=None)
KINDS = {
    "blocks": ({}, dict(max_tokens_per_row=128), dict()),
    "full attention": (
        FULL,
        dict(max_tokens_per_row=24),
        dict(rollout_block_size=4, prefix_cache=False, remasking="static"),
    ),
}
OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2": (2, dict(use_distributed_optimizer=True)),
    "dp2 overlap": (2, OVERLAP),
    "cp2": (2, dict(context_parallel_size=2)),
    "pp2 vpp2": (2, dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)),
}
CASES = [("blocks", layout) for layout in LAYOUTS] + [("full attention", "dp2")]


def make(kind: str, parallel: dict):
    """The session of a kind; its policy, value model, reference and the teacher's state, with random weights."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, model_config, vocabulary

    settings = ParallelConfig(**parallel)
    model = model_config(num_layers=4, init_method_std=0.3, **KINDS[kind][0])
    session = Session(model, settings, Words(), initialize(settings, seed=1), vocabulary())
    adam = OptimizerConfig(lr=1e-2, adam_eps=1e-3)
    states = {"policy": session.train_state(adam, 10), "value": session.value_state(adam, 10)}
    return session, states | {"reference": session.train_state(None, 1), "teacher": session.train_state(None, 1)}


def begin(kind: str, folder: Path) -> None:
    from megatron_dlm.checkpoint.distributed import save
    from tests.tiny import disturb

    for seed, (name, state) in enumerate(make(kind, {})[1].items()):
        disturb(state.module, seed)
        save(state, folder / name, 0, {}, with_optimizer=False)


def steps(kind: str, parallel: dict, folder: Path, count: int) -> list[dict[str, float]]:
    """Metrics of the first RL steps."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.config.value import ValueConfig
    from megatron_dlm.rl.learner import Models
    from megatron_dlm.rl.teacher import Teacher
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig
    from tests.rl.test_trainer import RL, ROLLOUT, EvenFirst, prompts
    from tests.tiny import quiet

    session, states = make(kind, parallel)
    for name, state in states.items():
        load(state, folder / name, with_optimizer=False)
        if state.optimizer is not None:
            state.optimizer.reload_model_params()
    rollout = dataclasses.replace(ROLLOUT, verify_refit=True, rollout_batch_size=4, **KINDS[kind][2])
    rl = dataclasses.replace(
        RL,
        num_steps_per_rollout=2,
        min_group_accuracy=0.0,
        max_group_accuracy=1.0,
        kl_reference="frozen",
        kl_loss_coef=0.1,
        entropy_coef=0.05,
        distill_coef=0.1,
        offload_train=True,
        offload_rollout=True,
        **KINDS[kind][1],
    )
    teacher = Teacher(states["teacher"], session.model, session.grid)
    models = Models(states["policy"], states["value"], states["reference"], teacher)
    value = ValueConfig(use_value_model=True, gamma=0.95, gae_lambda=0.9)
    rig = RolloutRig.open(session, states["policy"], rollout, 6, 9)
    trainer = TraceRLTrainer(
        session, states["policy"], rig, EvenFirst(), prompts(13), rl, rollout, seed=5, models=models, value=value
    )
    found = [trainer.step(quiet()) for _ in range(count)]
    assert rig.engine.weight_version == count + 1
    frozen = [states[name].named_parameters() for name in ("reference", "teacher")]
    assert not any(one.requires_grad for parameters in frozen for _, one in parameters)
    assert all(torch.isfinite(one).all() for _, one in states["value"].named_parameters())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, tuple[Path, list[dict[str, float]]]]:
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("start")
        pool(1).run(begin, kind, folder)
        found[kind] = folder, pool(1).run(steps, kind, {}, folder, 2)[0]
    return found


LEARNED = ("loss", "grad_norm", "entropy", "ratio_max", "ref_k3", "teacher_kl", "kl_loss", "pg_loss")
VALUED = ("loss", "grad_norm", "value", "return", "explained_variance", "clipfrac")


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_steps_are_those_of_one_process(alone, kind: str, layout: str) -> None:
    """The second step has values, old log-probabilities and rollouts of the weights that the first one left."""
    world, parallel = LAYOUTS[layout]
    folder, expected = alone[kind]
    assert all(metrics["train/ref_k3"] > 0.01 and metrics["train/teacher_kl"] > 0.01 for metrics in expected)
    for metrics in pool(world).run(steps, kind, parallel, folder, 2):
        for found, one in zip(metrics, expected, strict=True):
            assert all(np.isfinite(value) for value in found.values())
            for name, value in one.items():
                if name.startswith("rollout/"):
                    assert found[name] == pytest.approx(value, rel=1e-9), name
            for name in (*(f"train/{name}" for name in LEARNED), *(f"value/{name}" for name in VALUED)):
                assert found[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), name
            assert found["train/targets"] == one["train/targets"] and found["train/updates"] == 2
            assert found["train/train_rollout_logprob_abs_diff"] < 1e-4
