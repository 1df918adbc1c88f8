"""Switches to what the published code of TraceRL does (docs/parity.md): each against a computation of its own."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.rl.methods import TARGET, counts_of, replay
from megatron_dlm.rl.objective import PolicyObjective
from megatron_dlm.rl.update import UpdateSettings, logprob_forward, plan_updates
from tests.diffusion.oracles import random_group
from tests.rl.records import record_of
from tests.rl.test_trainer import RL, ROLLOUT, make_trainer, weights
from tests.tiny import EOS_ID, PADDED, disturb, one_process, quiet, vocabulary

TEMPERATURE = 0.7
SETTINGS = UpdateSettings(
    objective=PolicyObjective(0.2, 0.2, 0.01),
    temperature=TEMPERATURE,
    aggregation="constant",
    longest=12,
    num_updates=4,
    max_tokens_per_row=512,
    states=replay(Grid(4)),
)


def logprobs(logits: torch.Tensor, labels: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Of a model that says nothing but `logits`."""
    tp = SimpleNamespace(tp=None)
    model = SimpleNamespace(module=SimpleNamespace(forward_row=lambda row, headless: logits, pg_collection=tp))
    row = SimpleNamespace(row=SimpleNamespace(targets=SimpleNamespace(label=labels)))
    settings = dataclasses.replace(SETTINGS, bf16_logprobs=bf16)
    output, loss = logprob_forward(vocabulary(), settings)(row, model)
    return loss(output)


def test_log_probabilities_in_bfloat16_are_those_of_a_bfloat16_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 12 * torch.randn(500, PADDED, generator=generator) + 40
    allowed = [token for token in range(vocabulary().size) if token != vocabulary().mask_id]
    pick = torch.randint(0, len(allowed), (500, 1), generator=generator)
    labels = torch.tensor(allowed)[pick][:, 0]
    tempered = logits[:, allowed] / TEMPERATURE
    coarse = torch.log_softmax(tempered.bfloat16(), -1).gather(1, pick)[:, 0]
    fine = torch.log_softmax(tempered.double(), -1).gather(1, pick)[:, 0]
    assert coarse.dtype == torch.bfloat16
    found = logprobs(logits, labels, True)
    assert torch.equal(found, found.bfloat16().float())
    exact = torch.log_softmax(tempered.bfloat16().double(), -1).gather(1, pick)[:, 0]
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2e-5)
    torch.testing.assert_close(found, coarse.float(), rtol=2**-7, atol=5e-3)  # which rounds on the way, too
    assert (found == coarse).float().mean() > 0.9
    torch.testing.assert_close(logprobs(logits, labels, False).double(), fine, rtol=1e-5, atol=1e-4)
    assert (coarse.double() - fine).abs().max() > 0.1


def test_a_bfloat16_log_probability_can_be_learned() -> None:
    logits = torch.randn(9, PADDED, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(9)
    tempered = logits.detach() / TEMPERATURE
    tempered[:, vocabulary().size :] = tempered[:, vocabulary().mask_id] = float("-inf")
    expected = (torch.nn.functional.one_hot(labels, PADDED) - tempered.softmax(-1)) / TEMPERATURE
    (found,) = torch.autograd.grad(logprobs(logits, labels, True).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def bf16_state(distributed: bool, bf16: bool):
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.training.state import TrainState
    from tests.tiny import model_config

    groups, parallel = one_process(), ParallelConfig(use_distributed_optimizer=distributed)
    config = model_config()
    megatron = transformer_config(config, parallel, dtype=torch.bfloat16 if bf16 else torch.float32)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None):
        model = BlockDiffusionModel(
            megatron, model_shape(config), groups.pg_collection, pre_process, post_process, vp_stage
        )
        return disturb(model, 0)

    return TrainState.build(build, megatron, OptimizerConfig(lr=3e-4, clip_grad=0.0), parallel, groups, 100)


def take_step(state, seed: int) -> None:
    """An optimizer step along gradients that are drawn."""
    from megatron_dlm import platform

    state.chunks[0].zero_grad_buffer()
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in state.named_parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    with platform.cuda_calls_on_cpu():
        assert state.optimizer.step()[0]


def values(state) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.named_parameters()}


def masters(state) -> torch.Tensor:
    """All that the optimizer moves, in its own precision."""
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    return torch.cat(
        [p.detach().float().flatten() for one in parts for g in one.optimizer.param_groups for p in g["params"]]
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_forgotten_optimizer_steps_as_a_new_one(distributed: bool, bf16: bool) -> None:
    from megatron_dlm.training.state import forget_optimizer

    forgetful, lasting, fresh = (bf16_state(distributed, bf16) for _ in range(3))
    for state in (forgetful, lasting):
        for step in range(3):
            take_step(state, step)
    before = masters(forgetful)
    forget_optimizer(forgetful)
    if bf16:  # what a step had moved them by and a bfloat16 cannot hold is gone
        assert not torch.equal(masters(forgetful), before)
    assert torch.equal(masters(forgetful), before.bfloat16().float() if bf16 else before)
    with torch.no_grad():
        for (_, here), (_, there) in zip(fresh.named_parameters(), forgetful.named_parameters(), strict=True):
            here.copy_(there)
    fresh.optimizer.reload_model_params()
    for step in range(3, 6):
        for state in (forgetful, lasting, fresh):
            take_step(state, step)
        assert torch.equal(masters(forgetful), masters(fresh))
        assert all(torch.equal(value, values(fresh)[name]) for name, value in values(forgetful).items())
    assert not torch.equal(masters(lasting), masters(fresh))


@pytest.mark.parametrize("reset", [False, True])
def test_the_loop_forgets_before_each_step(reset: bool, monkeypatch) -> None:
    """The first step of a second trainer, on the weights of the first, is the second step of one that forgets."""
    rl = dataclasses.replace(RL, num_steps_per_rollout=1, reset_optimizer=reset)
    trainer = make_trainer(rl=rl)
    trainer.step(quiet())
    other = make_trainer(rl=rl, progress=copy.deepcopy(trainer.progress()))
    with torch.no_grad():
        for (_, here), (_, there) in zip(other.state.named_parameters(), trainer.state.named_parameters(), strict=True):
            here.copy_(there)
    other.state.optimizer.reload_model_params()
    other.rig.refit()
    for one in (trainer, other):
        one.step(quiet())
    same = all(torch.allclose(weights(other)[name], value, atol=1e-6) for name, value in weights(trainer).items())
    assert same == reset


def test_unshuffled_updates_take_responses_in_order() -> None:
    rng = np.random.default_rng(0)
    traces = [trace for n in range(5) for trace in random_group(3 + n, [2, 7, 4], 4, rng, f"p{n}")]
    records = []
    for index, trace in enumerate(traces):
        item = SETTINGS.states.item(trace, 0)
        records.append(record_of(trace, index, item, counts_of(item, TARGET)))

    def order(shuffle: bool) -> list[list[int]]:
        settings = dataclasses.replace(SETTINGS, shuffle=shuffle)
        return [[record.index for record in chosen] for chosen, _ in plan_updates(records, settings, one_process(), 9)]

    kept = order(False)
    assert len(kept) == 4 and [index for update in kept for index in update] == list(range(15))
    mixed = order(True)
    assert sorted(index for update in mixed for index in update) == list(range(15))
    assert all(max(update) - min(update) >= len(update) for update in mixed)


def displacement(aggregation: str) -> tuple[torch.Tensor, int]:
    """How far one update by plain gradient descent moves the weights, and the longest response that it learned from."""
    rl = dataclasses.replace(RL, num_steps_per_rollout=1, loss_aggregation=aggregation, kl_loss_coef=0.0)
    rollout = dataclasses.replace(ROLLOUT, rollout_max_response_len=30, stop_token_ids=[*range(5, 40), EOS_ID])
    trainer = make_trainer(rl=rl, rollout=rollout, optimizer=OptimizerConfig(optimizer="sgd", lr=1e-3, clip_grad=0.0))
    longest, prepare = [], trainer.learner.prepare

    def listen(learned, *rest):
        longest.append(max(record.length for record in learned))
        return prepare(learned, *rest)

    trainer.learner.prepare = listen
    before = weights(trainer)
    trainer.step(quiet())
    moved = torch.cat([(value - before[name]).double().flatten() for name, value in weights(trainer).items()])
    return moved, longest[0]


def test_the_loss_can_be_divided_by_the_longest_response_of_the_step() -> None:
    (constant, longest), (relative, same) = displacement("constant"), displacement("longest")
    assert longest == same < 30
    assert constant.norm() > 0
    torch.testing.assert_close(relative / constant.norm(), constant * 30 / longest / constant.norm(), rtol=0, atol=2e-3)


def test_a_band_of_everything_leaves_out_equal_rewards_alone() -> None:
    wide = dataclasses.replace(RL, min_group_accuracy=0.0, max_group_accuracy=1.0)
    narrow = dataclasses.replace(RL, min_group_accuracy=0.2, max_group_accuracy=0.8)
    rewards = {"none": [0] * 10, "one": [1] + [0] * 9, "half": [1, 0] * 5, "nine": [1] * 9 + [0], "all": [1] * 10}
    rng = np.random.default_rng(0)
    records = []
    for name, correct in rewards.items():
        for index, (trace, right) in enumerate(zip(random_group(5, [4] * 10, 4, rng, name), correct, strict=True)):
            item = SETTINGS.states.item(trace, 0)
            right = float(right)
            records.append(record_of(trace, index, item, counts_of(item, TARGET), correct=right, reward=right))
    trainer = make_trainer()
    for band, kept in ((wide, ["one", "half", "nine"]), (narrow, ["half"])):
        trainer.rl = dataclasses.replace(
            trainer.rl, **{name: getattr(band, name) for name in ("min_group_accuracy", "max_group_accuracy")}
        )
        learned, advantages = trainer._advantages(records)
        assert list(dict.fromkeys(record.group for record in learned)) == kept
        for name in kept:
            expected = (np.array(rewards[name]) - np.mean(rewards[name])) / np.std(rewards[name])
            found = [advantages[record.group, record.sample] for record in learned if record.group == name]
            assert found == pytest.approx(expected.tolist())
