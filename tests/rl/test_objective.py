from __future__ import annotations

import math

import pytest
import torch

from megatron_dlm.rl.normalise import Counts, unit_weights
from megatron_dlm.rl.objective import PolicyObjective

OBJECTIVE = PolicyObjective(eps_clip=0.2, eps_clip_high=0.2, kl_coef=0.01)


def column(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_the_example_of_the_specification() -> None:
    """Old log-probability -1, new -0.7, advantage 1: ratio 1.34986, clipped to 1.2; k3 = 0.0408182."""
    loss, metrics = OBJECTIVE(column(-0.7), column(-1.0), column(1.0), column(1.0))
    assert metrics["ratio"].item() == pytest.approx(1.34986, abs=1e-5)
    assert metrics["pg_loss"].item() == pytest.approx(-1.2)
    assert metrics["k3"].item() == pytest.approx(0.0408182, abs=1e-7)
    assert loss.item() == pytest.approx(-1.2 + 0.01 * 0.0408182, abs=1e-9)
    assert metrics["pg_clipfrac"].item() == 1 and metrics["targets"].item() == 1
    assert metrics["ppo_kl"].item() == pytest.approx(-0.3)


@pytest.mark.parametrize(
    "delta, advantage, surrogate, clipped",
    [
        (0.0, 2.0, 2.0, 0),
        (0.0, -2.0, -2.0, 0),
        (0.1, 1.0, math.exp(0.1), 0),
        (1.0, 1.0, 1.3, 1),  # a good token grows up to 1 + eps_high
        (1.0, -1.0, -math.e, 0),
        (-0.1, -1.0, -math.exp(-0.1), 0),  # a bad token that grew is pushed back with its whole ratio
        (-1.0, -1.0, -0.8, 1),
        (-1.0, 1.0, math.exp(-1), 0),
        (50.0, -1.0, -math.exp(10), 0),
        (-50.0, 1.0, math.exp(-10), 0),
    ],
)
def test_surrogate_of_one_token(delta: float, advantage: float, surrogate: float, clipped: int) -> None:
    _, metrics = PolicyObjective(0.2, 0.3, 0.0)(column(delta - 3), column(-3.0), column(advantage), column(1.0))
    assert metrics["pg_loss"].item() == pytest.approx(-surrogate)
    assert metrics["pg_clipfrac"].item() == clipped


def test_the_largest_ratio_is_among_the_metrics_also_of_a_row_without_targets() -> None:
    _, metrics = OBJECTIVE(column(-1.0, -2.0, -3.0), column(-2.0, -2.0, -1.0), column(1.0, 1.0, 1.0), column(1, 1, 1))
    assert metrics["ratio_max"].item() == pytest.approx(math.e)
    loss, metrics = OBJECTIVE(column(grad=True), column(), column(), column())
    assert metrics["ratio_max"].item() == 0 and loss.requires_grad


def naive(
    logprob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    low: float,
    high: float,
    beta: float,
):
    total = 0
    for lp, lp_old, a, w in zip(logprob, old, advantage, weight):
        ratio = torch.exp(lp - lp_old)
        bounded = (
            ratio
            if 1 - low <= ratio <= 1 + high
            else torch.tensor(1 - low if ratio < 1 else 1 + high, dtype=torch.float64)
        )
        surrogate = ratio * a if ratio * a <= bounded * a else bounded * a
        total = total - w * surrogate + beta * w * (torch.exp(lp_old - lp) - 1 - (lp_old - lp))
    return total


@pytest.mark.parametrize("low, high, beta", [(0.2, 0.2, 0.0), (0.2, 0.28, 0.01), (0.05, 0.05, 1.0)])
def test_loss_and_gradient_are_those_of_the_formula(low: float, high: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(200, generator=generator, dtype=torch.float64)
    old, advantage, weight, delta = -draw().abs(), draw(), draw().abs(), 0.3 * draw()
    one, other = ((old + delta).requires_grad_(True) for _ in range(2))
    loss, _ = PolicyObjective(low, high, beta)(one, old, advantage, weight)
    expected = naive(other, old, advantage, weight, low, high, beta)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, one)[0], torch.autograd.grad(expected, other)[0], rtol=1e-12, atol=1e-12
    )


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    logprob = column(-1.0, -2.0, -0.5, grad=True)
    loss, metrics = OBJECTIVE(logprob, logprob.detach(), column(1.0, -2.0, 0.5), column(0.1, 0.2, 0.3))
    loss.backward()
    assert logprob.grad.tolist() == pytest.approx([-0.1, 0.4, -0.15])
    assert metrics["ratio"].item() == 3 and metrics["k3"].item() == 0 and metrics["pg_clipfrac"].item() == 0


def test_no_targets_keep_the_graph() -> None:
    source = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    empty = source[:0]
    loss, metrics = OBJECTIVE(empty, empty.detach(), empty.detach(), empty.detach())
    assert loss.requires_grad and loss.item() == 0 and set(value.item() for value in metrics.values()) == {0.0}


@pytest.mark.parametrize("aggregation", ["constant", "response", "token"])
def test_weights(aggregation: str) -> None:
    """A hand-made update: losses 1..6 over responses of 1, 2 and 3 tokens."""
    counts, losses = [1, 2, 3], [[1.0], [2.0, 3.0], [4.0, 5.0, 6.0]]
    expected = {"constant": 21 / (3 * 10), "response": (1 + 2.5 + 5) / 3, "token": 21 / 6}[aggregation]
    weights = unit_weights([Counts(n, n, n, n) for n in counts], aggregation, 10)
    assert sum(weight * sum(loss) for weight, loss in zip(weights, losses)) == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", ["constant", "response", "token"])
def test_weights_of_responses_without_targets_are_finite(aggregation: str) -> None:
    for counts in ([0, 0], [0, 3]):
        assert all(
            math.isfinite(weight) for weight in unit_weights([Counts(n, n, n, n) for n in counts], aggregation, 10)
        )
