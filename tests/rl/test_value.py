"""The value loss against autograd of a plain formula; advantages of tokens whose response lies in several rows; what an
update says of itself.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.rl.gae import learned_steps, outcome_rewards, step_gae
from megatron_dlm.rl.value import (
    Rewarded,
    ValueRow,
    ValueSettings,
    token_advantages,
    update_value,
    value_loss,
    values_of,
)
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item
from tests.tiny import disturb, make_session

SETTINGS, LENGTH = ValueSettings(eps_clip=0.2, gamma=0.9, gae_lambda=0.7), 192


def test_the_loss_is_the_plain_formula() -> None:
    """Token by token: errors inside and outside of the clip, on both sides of the return."""
    rng = np.random.default_rng(0)
    value = torch.tensor(rng.normal(size=200), requires_grad=True)
    old, returns, weight = (torch.tensor(rng.normal(size=200)) for _ in range(3))
    loss, metrics = value_loss(value, old, returns, weight, 0.3)
    (found,) = torch.autograd.grad(loss, value)
    expected, clipped, gradient = 0.0, 0, []
    for v, o, r, w in zip(value.tolist(), old.tolist(), returns.tolist(), weight.tolist()):
        near = o + 0.3 if v > o + 0.3 else o - 0.3 if v < o - 0.3 else v
        expected += w * max((v - r) ** 2, (near - r) ** 2) / 2
        held = (near - r) ** 2 > (v - r) ** 2
        clipped += held
        gradient.append(0.0 if held else w * (v - r))
    assert loss.item() == pytest.approx(expected, rel=1e-12) and 10 < clipped < 190
    np.testing.assert_allclose(found.numpy(), gradient, atol=1e-12)
    assert metrics["clipfrac"] == clipped and metrics["targets"] == 200
    assert metrics["value"].item() == pytest.approx(old.sum().item())


def test_without_targets_there_is_a_graph() -> None:
    source = torch.zeros(3, requires_grad=True)
    empty = source[:0]
    loss, metrics = value_loss(empty, *[empty.detach()] * 3, 0.2)
    assert loss.requires_grad and loss.item() == 0 and not any(value.item() for value in metrics.values())


@functools.cache
def case() -> tuple[list, dict[int, Rewarded], list[Row], list[Row]]:
    """Traces, their rewards, one row with all of them, and rows with their views apart."""
    traces, grid = random_group(5, [9, 2, 6, 7], 4, np.random.default_rng(4), "p"), Grid(4)
    items = [(n, trace_item(trace, grid, 2)) for n, trace in enumerate(traces)]
    rewarded = {}
    for n, trace in enumerate(traces):
        steps, learned = learned_steps(trace, grid, 2), np.ones(len(trace.response_ids), dtype=bool)
        rewarded[n] = Rewarded(outcome_rewards(steps, learned, 1.0 - n), steps, learned)
    one = build_row(items, LENGTH, MASK_ID, PAD_ID)
    views = lambda item, parity: item.views.chosen(slice(parity, None, 2))
    apart = [
        build_row(
            [(n, dataclasses.replace(item, views=views(item, parity))) for n, item in items], 128, MASK_ID, PAD_ID
        )
        for parity in (0, 1)
    ]
    return traces, rewarded, [one], [*apart, build_row([], 128, MASK_ID, PAD_ID)]


def by_token(rows: list[Row], columns: list) -> dict[tuple[int, int], float]:
    return {
        key: number
        for row, column in zip(rows, columns)
        for key, number in zip(zip(row.targets.response.tolist(), row.targets.index.tolist()), column.tolist())
    }


def some_values(rows: list[Row]) -> list[torch.Tensor]:
    """A value for each token, whatever its row."""
    return [torch.sin(row.targets.response * 7.0 + row.targets.index * 1.3) for row in rows]


def test_advantages_are_those_of_whole_responses() -> None:
    """In one row, and with the views of each response in two."""
    traces, rewarded, one, apart = case()
    found = []
    for rows in (one, apart):
        pairs = token_advantages(rows, some_values(rows), rewarded, SETTINGS)
        assert all(column.dtype == torch.float64 for pair in pairs for column in pair)
        found.append([by_token(rows, [pair[part] for pair in pairs]) for part in (0, 1)])
    assert found[0] == found[1] and len(found[0][0]) == sum(len(trace.response_ids) for trace in traces)
    for n, what in rewarded.items():
        values = np.sin(np.float32(n * 7.0) + np.arange(len(what.steps), dtype=np.float32) * np.float32(1.3))
        expected = step_gae(what.steps, what.rewards, values, what.trainable, 0.9, 0.7)
        for part in (0, 1):
            mine = [found[0][part][n, index] for index in range(len(what.steps))]
            np.testing.assert_allclose(mine, expected[part], atol=1e-5)


def test_stages_without_values_have_zeros() -> None:
    _, rewarded, _, rows = case()
    for row, pair in zip(rows, token_advantages(rows, None, rewarded, SETTINGS), strict=True):
        assert all(len(column) == len(row.targets.slot) and not column.any() for column in pair)


def test_a_response_that_is_not_whole_is_a_mistake_of_the_planner() -> None:
    _, rewarded, one, apart = case()
    values = some_values(apart)
    with pytest.raises(ValueError, match="are not its learned tokens"):
        token_advantages(apart[:1], values[:1], rewarded, SETTINGS)
    with pytest.raises(ValueError, match="a target twice"):
        token_advantages([*one, *apart], some_values([*one, *apart]), rewarded, SETTINGS)


def make_value(optimizer: OptimizerConfig | None):
    state = make_session().value_state(optimizer, 50)
    disturb(state.module, 1)
    if optimizer is not None:
        state.optimizer.reload_model_params()
    return state


def value_rows(state, shift: float = 0.0) -> list[ValueRow]:
    _, rewarded, _, rows = case()
    old = values_of(state, [row.to(platform.device()) for row in rows], 128)
    pairs = token_advantages(rows, old, rewarded, SETTINGS)
    return [
        ValueRow(row.to(platform.device()), known + shift, returns, torch.full_like(returns, 1 / 24))
        for row, known, (_, returns) in zip(rows, old, pairs)
    ]


def test_an_update_reports_on_the_old_values() -> None:
    state = make_value(OptimizerConfig(lr=1e-3, clip_grad=0.0))
    rows = value_rows(state)
    metrics = update_value(state, [(rows, 128)], SETTINGS)
    old, returns = (torch.cat([getattr(row, name) for row in rows]).double() for name in ("old_value", "returns"))
    assert len(old) == 24
    assert metrics["loss"] == pytest.approx((0.5 * (old - returns).square()).mean().item(), rel=1e-5)
    assert metrics["value"] == pytest.approx(old.mean().item(), rel=1e-5)
    assert metrics["return"] == pytest.approx(returns.mean().item(), rel=1e-5)
    expected = 1 - ((returns - old).var() / returns.var()).item()
    assert metrics["explained_variance"] == pytest.approx(expected, rel=1e-4)
    assert metrics["clipfrac"] == 0 and metrics["lr"] == 1e-3 and metrics["grad_norm"] > 0


def test_returns_that_are_all_equal_explain_nothing() -> None:
    state = make_value(OptimizerConfig(lr=0.1, optimizer="sgd"))
    rows = [dataclasses.replace(row, returns=torch.full_like(row.returns, 0.3)) for row in value_rows(state)]
    assert update_value(state, [(rows, 128)], SETTINGS)["explained_variance"] == 0.0


def test_learns_what_can_be_told_of_the_returns() -> None:
    """From a head of zeros, as a run begins. Responses to one prompt all begin in the same state, where their mean
    return is the best that can be said; every later state is of one response.
    """
    state = make_value(OptimizerConfig(lr=1e-2, clip_grad=1.0))
    with torch.no_grad():
        state.module.value_head.weight.zero_()
    state.optimizer.reload_model_params()
    settings = dataclasses.replace(SETTINGS, gamma=1.0, gae_lambda=1.0)
    _, rewarded, _, rows = case()
    said = []
    for _ in range(30):
        old = values_of(state, [row.to(platform.device()) for row in rows], 128)
        pairs = token_advantages(rows, old, rewarded, settings)
        prepared = [
            ValueRow(row.to(platform.device()), known, returns, torch.full_like(returns, 1 / 24))
            for row, known, (_, returns) in zip(rows, old, pairs)
        ]
        said.append(update_value(state, [(prepared, 128)], settings))
    assert said[0]["value"] == 0 and said[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    first: dict[int, list[float]] = {}
    for what in rewarded.values():
        for index in np.flatnonzero(what.steps == what.steps.min()).tolist():
            first.setdefault(index, []).append(what.rewards.max() or what.rewards.min())
    least = sum(0.5 * len(returns) * np.var(returns) for returns in first.values()) / 24
    assert 0.99 * least < said[-1]["loss"] < least + 0.02 < 0.5 * said[0]["loss"]
