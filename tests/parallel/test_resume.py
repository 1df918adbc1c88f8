"""Training that stops, is saved and goes on: the same as training that never stopped, for SFT and TraceRL."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from tests.harness import pool

LAYOUTS = {
    "1": (1, dict()),
    "dp2": (2, dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)),
    "tp2 pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "cp2 pp2 vpp2": (
        4,
        dict(
            context_parallel_size=2,
            pipeline_model_parallel_size=2,
            num_virtual_stages_per_pipeline_rank=2,
            use_distributed_optimizer=True,
        ),
    ),
}
LAST, MIDDLE = 4, 2


def open_trainer(stage: str, parallel: dict, load: Path | None):
    """A trainer as the commands put it together, and what saves it."""
    from megatron_dlm.commands.weights import restore
    from megatron_dlm.config.checkpoint import CheckpointConfig
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.config.sft import SFTConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig
    from megatron_dlm.sft.trainer import SFTTrainer
    from megatron_dlm.training.setup import Session
    from tests.rl.test_trainer import RL, ROLLOUT, EvenFirst, prompts
    from tests.sft.test_trainer import samples
    from tests.tiny import Words, model_config, sampler_of, vocabulary

    settings = ParallelConfig(**parallel)
    model = model_config(num_layers=4, init_method_std=0.3)
    session = Session(model, settings, Words(), initialize(settings, seed=1), vocabulary())
    optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-3, lr_warmup_iters=2, lr_decay_style="cosine", clip_grad=0.5)
    state = session.train_state(optimizer, 2 * LAST)
    checkpoint = CheckpointConfig(load=None if load is None else str(load))
    restored = restore(state, checkpoint, session.model, stage)
    if stage == "sft":
        sft = SFTConfig(data_path=["x"], train_iters=LAST, global_batch_size=5, max_tokens_per_row=256)
        return session, state, SFTTrainer(session, state, sampler_of(samples(13), 5, restored), sft, 5, restored)
    rig = RolloutRig.open(session, state, ROLLOUT, 6, 9)
    rl = dataclasses.replace(RL, num_rollout=LAST, num_steps_per_rollout=2)
    return session, state, TraceRLTrainer(session, state, rig, EvenFirst(), prompts(13), rl, ROLLOUT, 5, restored)


def train(stage: str, parallel: dict, load: Path | None, until: int, save: Path | None) -> tuple[dict, list[float]]:
    """Train up to step `until`; returns this rank's weights and the losses."""
    from megatron_dlm.commands.weights import checkpointer
    from megatron_dlm.config.checkpoint import CheckpointConfig
    from tests.tiny import quiet

    session, state, trainer = open_trainer(stage, parallel, load)
    losses, report = [], quiet()
    where = CheckpointConfig(save=None if save is None else str(save))
    keep = checkpointer(session, state, where, stage, trainer.progress, report.say)
    while (done := state.iteration if stage == "sft" else trainer.step_index) < until:
        if stage == "sft":
            losses.append(trainer.step()[0].metrics["loss"])
        else:
            losses.append(trainer.step(report)["train/loss"])
        keep(done + 1, done + 1 == until)
    state.gather_parameters()
    return {name: parameter.detach().clone() for name, parameter in state.named_parameters()}, losses


def run(layout: str, stage: str, load: Path | None, until: int, save: Path | None = None) -> tuple[list[dict], list]:
    world, parallel = LAYOUTS[layout]
    results = pool(world).run(train, stage, parallel, load, until, save)
    assert all(losses == results[0][1] for _, losses in results)
    return [weights for weights, _ in results], results[0][1]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """By layout and stage: a run to its end, its first half, and the folder of the latter's checkpoint."""

    @functools.cache
    def both(layout: str, stage: str) -> tuple[tuple, tuple, Path]:
        folder = tmp_path_factory.mktemp("half")
        return run(layout, stage, None, LAST), run(layout, stage, None, MIDDLE, folder), folder

    return both


@pytest.mark.parametrize("stage", ["sft", "tracerl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_and_resumed_is_the_same_to_the_last_bit(begun, layout: str, stage: str) -> None:
    (whole, losses), (half, first), folder = begun(layout, stage)
    resumed, second = run(layout, stage, folder, LAST)
    assert first + second == losses and len(second) == LAST - MIDDLE and 0 not in losses
    for one, before, other in zip(whole, half, resumed, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert any(not torch.equal(before[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", ["sft", "tracerl"])
@pytest.mark.parametrize(
    "before, after", [("1", "tp2 pp2"), ("tp2 pp2", "1"), ("dp2", "cp2 pp2 vpp2"), ("cp2 pp2 vpp2", "dp2")]
)
def test_resumed_in_another_layout_the_losses_go_on(begun, before: str, after: str, stage: str) -> None:
    (_, losses), _, folder = begun(before, stage)
    _, second = run(after, stage, folder, LAST)
    assert second == pytest.approx(losses[MIDDLE:], rel=0, abs=1e-5)
