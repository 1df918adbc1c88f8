"""What the learner makes of rewards: advantages from values, rows with what the loss needs, turns of the two models."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.value import ValueConfig
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import partition
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rl.gae import learned_steps
from megatron_dlm.rl.learner import Learner, Models
from megatron_dlm.rl.update import policy_forward, with_old_logprobs
from megatron_dlm.training.step import accumulate_gradients
from tests.diffusion.oracles import states
from tests.rl.learning import LONGEST, SEED, advantage_of, advantages_of, records_of, responses, settings_of
from tests.rl.test_gae import slow
from tests.rl.test_teacher import naive, of, traces_for
from tests.rl.test_trainer import RL, ROLLOUT, EvenFirst, prompts
from tests.tiny import (
    disturb,
    explicit_logits,
    furthest,
    gradients,
    make_session,
    make_state,
    quiet,
    vocabulary,
)

FULL = dict(full_attention=True, block_size=None)
during = lambda _: contextlib.nullcontext()


def make_value(session, optimizer: OptimizerConfig | None = None):
    """A value model with random weights, its head included."""
    value = session.value_state(optimizer, 50)
    disturb(value.module, 1)
    if optimizer is not None:
        value.optimizer.reload_model_params()
    return value


def dealt(traces: list[Trace], settings) -> list[list[Trace]]:
    """The traces of each update, as `Targets.response` numbers them."""
    order = stream(SEED, "partition", settings.step)
    return [[traces[index] for index in members] for members in partition(len(traces), settings.num_updates, order)]


def column(rows, values) -> dict[tuple[int, int], float]:
    """A number for each target, by (response, index)."""
    found = {}
    for row, numbers in zip(rows, values, strict=True):
        for key in zip(row.row.targets.response.tolist(), row.row.targets.index.tolist(), numbers.tolist()):
            assert key[:2] not in found
            found[key[:2]] = key[2]
    return found


@torch.no_grad()
def naive_values(model, trace: Trace, block: int | None, shrinkage: int) -> list[float]:
    """Of each token, from a pass over the state in which it was decided."""
    found = [float("nan")] * len(trace.response_ids)
    for state in states(trace, Grid(block), shrinkage):
        mask, places = torch.from_numpy(state.visible), torch.arange(len(state.shown))
        values = explicit_logits(model, torch.tensor(state.shown), places, mask, torch.tensor(state.decided))
        for position, value in zip(state.decided, values.tolist()):
            found[position - len(trace.prompt_ids)] = value
    return found


@pytest.mark.parametrize("shrinkage", [1, 2])
@pytest.mark.parametrize(("policy", "budget"), [({}, 44), (FULL, 24)], ids=["blocks", "full attention, split"])
def test_advantages_are_those_of_naive_values(policy: dict, budget: int, shrinkage: int) -> None:
    """In two updates, both with the values of the weights before the first; the outcome is rewarded at the end."""
    session = make_session(fp64=True, **policy)
    value = make_value(session)
    config = ValueConfig(use_value_model=True, gamma=0.9, gae_lambda=0.7)
    settings = settings_of(RLConfig(shrinkage=shrinkage), of(policy), budget, 2)
    learner = Learner(session, Models(make_state(**policy), value), config, SEED)
    traces = traces_for(policy)
    prepared = learner.prepare(records_of(traces, settings), advantages_of(traces), traces, settings)
    assert len(prepared) == 2 and sum(len(update.rows) for update in prepared) > 2
    for update, mine in zip(prepared, dealt(traces, settings)):
        found = column(update.rows, [row.advantage for row in update.rows])
        olds = column(update.rows, [row.old_value for row in update.value_rows])
        returns = column(update.rows, [row.returns for row in update.value_rows])
        assert len(found) == sum(len(trace.response_ids) for trace in mine)
        in_rows = [set(row.row.targets.response.tolist()) for row in update.rows]
        split = [number for number in range(len(mine)) if sum(number in row for row in in_rows) > 1]
        assert bool(split) == bool(policy), "under full attention a response lies in several rows"
        for number, trace in enumerate(mine):
            values = naive_values(value.module, trace, of(policy), shrinkage)
            steps = learned_steps(trace, settings.states.grid, shrinkage)
            rewards = [advantage_of(trace) if step == max(steps) else 0.0 for step in steps]
            expected = slow(steps, rewards, values, np.ones(len(steps), dtype=bool), 0.9, 0.7)
            keys = [(number, index) for index in range(len(steps))]
            np.testing.assert_allclose([olds[key] for key in keys], values, atol=1e-9)
            np.testing.assert_allclose([found[key] for key in keys], expected[0], atol=1e-9)
            np.testing.assert_allclose([returns[key] for key in keys], expected[1], atol=1e-9)
        for row, value_row in zip(update.rows, update.value_rows):
            assert torch.equal(row.weight, value_row.weight) and len(row.weight) == len(row.row.targets.slot)


def test_rewards_of_tokens_need_no_value_model() -> None:
    """They make the advantages in the place of the group's; values are 0."""
    settings, traces = settings_of(RLConfig(), 4, 64), responses()
    learner = Learner(make_session(), Models(make_state()), ValueConfig(gamma=0.8, gae_lambda=0.5), SEED)
    reward = lambda trace: np.cos(np.arange(len(trace.response_ids)) * 2.0 + len(trace.prompt_ids))

    def token_rewards(record, trace, steps, trainable):
        assert record.group == trace.prompt_key and record.sample == trace.sample and trainable.all()
        return reward(trace)

    unused = dict.fromkeys(advantages_of(traces), 1e9)
    (update,) = learner.prepare(records_of(traces, settings), unused, traces, settings, token_rewards)
    found = column(update.rows, [row.advantage for row in update.rows])
    assert update.value_rows == []
    for number, trace in enumerate(dealt(traces, settings)[0]):
        nothing, learned = np.zeros(len(trace.response_ids)), np.ones(len(trace.response_ids), dtype=bool)
        expected, _ = slow(trace.steps, reward(trace), nothing, learned, 0.8, 0.5)
        mine = [found[number, index] for index in range(len(expected))]
        np.testing.assert_allclose(mine, expected, atol=1e-12)


def test_the_first_update_needs_no_pass_for_the_old_policy() -> None:
    """Its weights are the old policy's still: loss, metrics and gradient are those with log-probabilities of before."""
    settings, traces = settings_of(RLConfig(), 4, 64, 2), responses()
    state = make_state()
    learner = Learner(make_session(), Models(state), ValueConfig(), SEED)
    prepare = lambda settings: learner.prepare(records_of(traces, settings), advantages_of(traces), traces, settings)
    first, second = prepare(settings)
    assert all(row.old_logprob is None for row in first.rows)
    assert all(len(row.old_logprob) == len(row.row.targets.slot) for row in second.rows)
    found = []
    for rows in (first.rows, with_old_logprobs(state, first.rows, first.length, vocabulary(), settings)):
        metrics = accumulate_gradients(state, rows, policy_forward(vocabulary(), settings), first.length)
        found.append((metrics, {name: one.main_grad.clone() for name, one in state.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10, abs=1e-12)
    assert furthest(found[0][1], found[1][1]) < 1e-10
    for how in ("current", "rollout"):
        for update in prepare(dataclasses.replace(settings, old_logprobs=how)):
            for row in update.rows:
                assert row.old_logprob is (None if how == "current" else row.rollout_logprob)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_penalty_holds_on_to_the_frozen_reference(kind: str) -> None:
    config = RLConfig(kl_reference="frozen", kl_loss_coef=0.5, kl_loss_type=kind, policy_loss_coef=0.0)
    settings, traces = settings_of(config, 4, 64, 2), responses()
    state, reference = make_state(), make_state(seed=9)
    learner = Learner(make_session(), Models(state, reference=reference), ValueConfig(), SEED)
    prepared = learner.prepare(records_of(traces, settings), advantages_of(traces), traces, settings)
    for update, mine in zip(prepared, dealt(traces, settings)):
        metrics = accumulate_gradients(state, update.rows, policy_forward(vocabulary(), settings), update.length)
        found = {name: parameter.main_grad.clone() for name, parameter in state.named_parameters()}
        total, k3 = 0, 0.0
        for trace in mine:
            with torch.no_grad():
                frozen = naive(reference.module, {}, trace)
            for index, own in naive(state.module, {}, trace).items():
                token = trace.response_ids[index]
                delta = own[token] - frozen[index][token]
                total = total + {"k1": delta, "k2": delta**2 / 2, "k3": torch.exp(-delta) - 1 + delta}[kind]
                k3 += (torch.exp(-delta) - 1 + delta).item()
        loss = 0.5 * total / (len(mine) * LONGEST)
        assert k3 > 1 and metrics["ref_k3"] == pytest.approx(k3, rel=1e-9)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert furthest(found, gradients(state.module, loss)) < 1e-9


ADAM = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5)


class Run:
    """A learner of both models in fp32, which learns the same responses in every step."""

    def __init__(self, **value: object) -> None:
        self.session = make_session()
        self.policy = self.session.train_state(ADAM, 50)
        disturb(self.policy.module, 0)
        self.policy.optimizer.reload_model_params()
        self.value = make_value(self.session, dataclasses.replace(ADAM, lr=2e-2))
        config = ValueConfig(use_value_model=True, **value)
        self.learner = Learner(self.session, Models(self.policy, self.value), config, SEED)

    def step(self, number: int) -> tuple[dict[str, float], list[dict[str, torch.Tensor]]]:
        """Metrics, and how far each weight of the two models has moved."""
        settings, traces = settings_of(RLConfig(), 4, 64, 2, step=number), responses()
        before = self.weights()
        prepared = self.learner.prepare(records_of(traces, settings), advantages_of(traces), traces, settings)
        metrics = self.learner.update(prepared, settings, during)
        moved = [{name: after[name] - old[name] for name in old} for old, after in zip(before, self.weights())]
        return metrics, moved

    def weights(self) -> list[dict[str, torch.Tensor]]:
        copied = lambda state: {name: one.detach().clone() for name, one in state.named_parameters()}
        return [copied(self.policy), copied(self.value)]


def changed(moved: dict[str, torch.Tensor]) -> bool:
    found = {bool(one.any()) for one in moved.values()}
    assert len(found) == 1, "some tensors moved and some did not"
    return found.pop()


def test_it_does_not_matter_which_model_is_updated_first() -> None:
    runs, steps = [Run(value_order="before"), Run(value_order="after")], []
    for run in runs:
        steps.append([run.step(number) for number in range(2)])
        assert all(changed(moved) for moved in steps[-1][-1][1])
    assert list(steps[0][0][0]) != list(steps[1][0][0]), "the order in which they report"
    for (one, _), (other, _) in zip(*steps):
        assert one == other
    for one, other in zip(runs[0].weights(), runs[1].weights()):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "policy", "value"),
    [
        (dict(), [1, 1, 1, 1], [1, 1, 1, 1]),
        (dict(value_interval=2), [1, 1, 1, 1], [1, 0, 1, 0]),
        (dict(value_warmup_steps=2), [0, 0, 1, 1], [1, 1, 1, 1]),
        (dict(value_warmup_steps=2, value_interval=3, value_order="after"), [0, 0, 1, 1], [1, 1, 0, 1]),
    ],
)
def test_who_learns_in_which_step(settings: dict, policy: list[int], value: list[int]) -> None:
    run = Run(**settings)
    for number in range(4):
        metrics, moved = run.step(number)
        assert [changed(one) for one in moved] == [bool(policy[number]), bool(value[number])]
        assert ("train/loss" in metrics, "value/loss" in metrics) == (bool(policy[number]), bool(value[number]))
        assert run.learner.policy_waits(number) != bool(policy[number])


def test_a_step_that_warms_the_value_model_up_leaves_policy_and_engine_alone() -> None:
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig

    session = make_session()
    state = session.train_state(ADAM, 100)
    disturb(state.module, 0)
    rig = RolloutRig.open(session, state, ROLLOUT, 6, ROLLOUT.rollout_max_response_len)
    models = Models(state, make_value(session, ADAM))
    how = ValueConfig(use_value_model=True, value_warmup_steps=1)
    trainer = TraceRLTrainer(
        session, state, rig, EvenFirst(), prompts(13), RL, ROLLOUT, seed=5, models=models, value=how
    )
    versions, found = [rig.engine.weight_version], []
    for _ in range(2):
        before = {name: one.detach().clone() for name, one in state.named_parameters()}
        found.append(trainer.step(quiet()))
        versions.append(rig.engine.weight_version)
        found[-1]["moved"] = changed({name: one.detach() - before[name] for name, one in state.named_parameters()})
    assert [metrics["moved"] for metrics in found] == [False, True] and versions == [1, 1, 2]
    assert "train/loss" not in found[0] and "perf/refit_bytes" not in found[0] and "train/loss" in found[1]
    assert all("value/loss" in metrics and metrics["train/tokens"] > 0 for metrics in found)
    assert found[1]["train/train_rollout_logprob_abs_diff"] < 1e-5
