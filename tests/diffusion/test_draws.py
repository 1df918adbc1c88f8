"""Masks of RL: what is hidden, what is predicted, and what the weights of targets sum to."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.diffusion.draws import (
    MaskDraws,
    bound_views,
    coupled_views,
    elbo_views,
    paired_views,
    quadrature,
    quadrature_views,
    random_views,
)
from megatron_dlm.diffusion.layout import Grid
from tests.diffusion.oracles import random_group, random_trace

GRIDS = [Grid(4), Grid(8), Grid(4, "response"), Grid(None)]
DRAWS = [random_views, coupled_views, paired_views, elbo_views, bound_views, quadrature_views]


def trace(prompt: int = 5, response: int = 9, seed: int = 0):
    return random_trace(prompt, response, 4, np.random.default_rng(seed))


def everything(one) -> np.ndarray:
    return np.ones(len(one.response_ids), dtype=bool)


def times_predicted(views, one) -> np.ndarray:
    """int [R], how many views predict each response token."""
    return np.bincount(views.position[views.target] - len(one.prompt_ids), minlength=len(one.response_ids))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("prompt, response", [(1, 1), (4, 8), (6, 3), (7, 13)])
def test_views_are_of_the_response_alone(draw, grid: Grid, prompt: int, response: int) -> None:
    one = trace(prompt, response)
    for number in range(20):
        views = draw(one, grid, everything(one), number, MaskDraws(draws=3))
        assert (np.diff(views.block) >= 0).all()
        assert not views.masked[views.position < prompt].any()
        assert not (views.target & ~views.masked).any()
        hidden = views.position[views.masked & ~views.target]
        assert (hidden >= prompt + response).all()  # the rest of the last block, and of the canvas
        assert views.target.any(1).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("draw", DRAWS)
def test_only_learned_tokens_are_predicted(draw, grid: Grid) -> None:
    one, learned = trace(), np.arange(9) % 3 != 1
    for number in range(20):
        views = draw(one, grid, learned, number, MaskDraws(draws=2))
        assert not times_predicted(views, one)[~learned].any()
    assert not len(draw(one, grid, np.zeros(9, dtype=bool), 1, MaskDraws()).block)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_pair_predicts_every_token_once(grid: Grid) -> None:
    one = trace()
    for number in range(20):
        views = coupled_views(one, grid, everything(one), number, MaskDraws(draws=3))
        assert (times_predicted(views, one) == 3).all()
        paired = paired_views(one, grid, everything(one), number, MaskDraws(draws=3))
        assert (times_predicted(paired, one) == 4).all()
        sums = np.bincount(paired.position[paired.target] - 5, paired.weight[paired.target], minlength=9)
        np.testing.assert_allclose(sums, 1.0)
    alone = [views for views in range(len(paired.block)) if paired.masked[views][paired.position[views] >= 5].all()]
    assert alone  # the full mask is among them


@pytest.mark.parametrize("per", ["response", "block", "token"])
def test_ratios_are_uniform_and_shared_as_said(per: str) -> None:
    """Over many draws half of the tokens are hidden; what two tokens share shows in how often both are hidden."""
    one, how = random_trace(0, 16, 4, np.random.default_rng(1)), MaskDraws(low=0.1, high=0.9, per=per)
    masks = np.zeros((4000, 16))
    for number in range(len(masks)):
        views = random_views(one, Grid(4), everything(one), number, how)
        masks[number, views.position[views.target]] = 1
    np.testing.assert_allclose(masks.mean(0), 0.5, atol=0.04)
    # E[t^2] = 0.25 + 0.8^2 / 12 for a shared ratio, 0.25 for two of their own
    shared, own = 0.25 + 0.64 / 12, 0.25
    in_block, across = (masks[:, 0] * masks[:, 1]).mean(), (masks[:, 0] * masks[:, 15]).mean()
    assert in_block == pytest.approx(own if per == "token" else shared, abs=0.025)
    assert across == pytest.approx(shared if per == "response" else own, abs=0.025)


def test_draws_are_functions_of_their_key_and_number() -> None:
    one = trace()
    views = lambda key, draws: random_views(one, Grid(4), everything(one), key, MaskDraws(draws=draws))
    assert np.array_equal(views(3, 2).masked, views(3, 2).masked)
    assert not np.array_equal(views(3, 1).masked, views(4, 1).masked)
    first, both = views(3, 1), views(3, 2)
    rows = {(block, row.tobytes()) for block, row in zip(both.block.tolist(), both.masked)}
    assert {(block, row.tobytes()) for block, row in zip(first.block.tolist(), first.masked)} < rows


@pytest.mark.parametrize("per", ["response", "block", "token"])
def test_the_weights_of_a_bound_have_the_mean_of_one_per_token(per: str) -> None:
    """1/t times the chance t of being hidden: each token counts once in expectation, and so does the mean."""
    one, sums = trace(), np.zeros(9)
    how = MaskDraws(low=0.2, high=0.8, per=per)
    for number in range(3000):
        views = elbo_views(one, Grid(4), everything(one), number, how)
        sums += np.bincount(views.position[views.target] - 5, views.weight[views.target], minlength=9)
    np.testing.assert_allclose(sums / 3000 * 9, 1.0, atol=0.07)
    assert sums.sum() / 3000 == pytest.approx(1.0, abs=0.02)


def test_quadrature_integrates_polynomials() -> None:
    for count in range(1, 6):
        nodes, weights = quadrature(count)
        for power in range(2 * count):
            assert (weights * nodes**power).sum() == pytest.approx(1 / (power + 1))


def test_the_bound_of_a_response_is_an_integral_over_ratios() -> None:
    one, sums = trace(), np.zeros(9)
    for number in range(4000):
        views = bound_views(one, Grid(4), everything(one), number, MaskDraws(draws=3))
        sums += np.bincount(views.position[views.target] - 5, views.weight[views.target], minlength=9)
    np.testing.assert_allclose(sums / 4000, 1.0, atol=0.07)


def test_falling_ratios_hide_more_of_the_beginning() -> None:
    one, how = random_trace(0, 32, 4, np.random.default_rng(1)), MaskDraws(draws=1, spread=0.2)
    hidden = np.zeros(32)
    for number in range(4000):
        views = quadrature_views(one, Grid(4), everything(one), number, how)
        hidden[views.position[views.target]] += 1
        assert views.weight[views.target].sum() == pytest.approx(1.0)
    by_block = hidden.reshape(8, 4).mean(1) / 4000
    expected = 0.5 + 0.2 * np.cos(np.pi * (np.arange(8) + 0.5) / 8)
    np.testing.assert_allclose(by_block, expected, atol=0.02)
    assert by_block.mean() == pytest.approx(0.5, abs=0.01)


def test_weights_of_quadrature_are_means_of_means() -> None:
    group = random_group(3, [1, 6, 11], 4, np.random.default_rng(2))
    for one in group:
        for number in range(30):
            views = quadrature_views(one, Grid(4), everything(one), number, MaskDraws(draws=3))
            if len(views.block):
                assert views.weight[views.target].sum() == pytest.approx(1.0)


def test_what_stands_behind_a_canvas_is_hidden_everywhere() -> None:
    one = random_trace(3, 5, 4, np.random.default_rng(0), full=True, behind=8)
    views = coupled_views(one, Grid(None), everything(one), 1, MaskDraws())
    behind = views.position >= len(one.tokens)
    assert behind.any() and views.masked[behind].all() and not views.target[behind].any()
