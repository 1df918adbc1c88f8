from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_dlm.rl.normalise import Counts, unit_weights
from megatron_dlm.rl.objective import PolicyObjective, kl

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


def random_columns(count: int = 200) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(count, generator=generator, dtype=torch.float64)
    old = -draw().abs()
    return dict(
        old=old,
        logprob=old + 0.4 * draw(),
        reference=old + 0.4 * draw(),
        sampling=old + 0.7 * draw(),
        advantage=draw(),
        weight=draw().abs(),
    )


def both(objective: PolicyObjective, formula, **options: torch.Tensor) -> dict[str, torch.Tensor]:
    """Assert that loss and gradient are those of a plain formula of log-probabilities; returns the metrics."""
    c = random_columns()
    one, other = (c["logprob"].clone().requires_grad_(True) for _ in range(2))
    loss, metrics = objective(one, c["old"], c["advantage"], c["weight"], **options)
    expected = formula(other, c)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, one)[0], torch.autograd.grad(expected, other)[0], rtol=1e-12, atol=1e-12
    )
    return metrics


def clipped(logprob: torch.Tensor, c: dict[str, torch.Tensor], eps: float = 0.2) -> torch.Tensor:
    ratio = torch.exp(logprob - c["old"])
    return torch.min(ratio * c["advantage"], ratio.clamp(1 - eps, 1 + eps) * c["advantage"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "estimator, formula",
    [
        ("k1", lambda delta: delta),
        ("k2", lambda delta: delta**2 / 2),
        ("k3", lambda delta: torch.exp(-delta) - 1 + delta),
    ],
)
def test_estimators_of_the_penalty(estimator: str, formula, frozen: bool) -> None:
    objective = PolicyObjective(0.2, 0.2, 0.3, estimator, policy_coef=0.0)
    reference = random_columns()["reference"] if frozen else None
    metrics = both(
        objective,
        lambda logprob, c: 0.3 * (c["weight"] * formula(logprob - c["reference" if frozen else "old"])).sum(),
        reference_logprob=reference,
    )
    assert ("ref_k3" in metrics) == frozen


def test_estimators_agree_on_the_divergence_of_near_policies() -> None:
    """All three are estimates of KL(policy || other) from samples of the policy."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    p, q = torch.log_softmax(logits[0], 0), torch.log_softmax(logits[0] + 0.2 * logits[1], 0)
    exact = (p.exp() * (p - q)).sum().item()
    for estimator, tolerance in (("k1", 1e-12), ("k2", 0.1), ("k3", 1e-12)):  # k2 is biased, slightly
        assert (p.exp() * kl(p - q, estimator)).sum().item() == pytest.approx(exact, rel=tolerance)


def test_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    metrics = both(
        PolicyObjective(0.2, 0.2, 0.0, eps_clip_c=1.3),
        lambda logprob, c: (
            -(
                c["weight"]
                * torch.where(
                    c["advantage"] < 0, torch.max(clipped(logprob, c), 1.3 * c["advantage"]), clipped(logprob, c)
                )
            ).sum()
        ),
    )
    assert 0 < metrics["pg_clipfrac_lower"] < metrics["targets"]


def test_importance_weights_are_truncated_on_both_sides_and_have_no_gradient() -> None:
    c = random_columns()
    metrics = both(
        PolicyObjective(0.2, 0.2, 0.0, tis=(0.5, 1.5)),
        lambda logprob, c: (
            -(c["weight"] * torch.exp(c["old"] - c["sampling"]).clamp(0.5, 1.5) * clipped(logprob, c)).sum()
        ),
        sampling_logprob=c["sampling"],
    )
    ratio = torch.exp(c["old"] - c["sampling"])
    assert metrics["tis_clipfrac"] == ((ratio < 0.5) | (ratio > 1.5)).sum() > 10
    assert metrics["tis"].item() == pytest.approx(ratio.sum().item())


def test_without_an_old_policy_the_present_one_stands_for_it() -> None:
    c = random_columns()
    logprob = c["logprob"].clone().requires_grad_(True)
    loss, metrics = OBJECTIVE(logprob, None, c["advantage"], c["weight"])
    loss.backward()
    torch.testing.assert_close(logprob.grad, -c["weight"] * c["advantage"])
    assert metrics["ratio"] == 200 and metrics["k3"] == 0


def test_units_have_one_ratio_and_weigh_their_penalty_as_told() -> None:
    """Three units of targets with coefficients; the penalty has weights of its own."""
    c, rng = random_columns(12), np.random.default_rng(0)
    unit = torch.from_numpy(rng.permutation(np.repeat([0, 1, 2], 4)))
    coefficient = torch.from_numpy(rng.uniform(0.1, 0.5, 12))
    advantage, weight, kl_weight = column(1.0, -0.5, 2.0), column(0.2, 0.3, 0.4), column(0.7, 0.1, 0.9)
    one, other = (c["logprob"].clone().requires_grad_(True) for _ in range(2))
    loss, metrics = PolicyObjective(0.2, 0.2, 0.5, "k2")(
        one, c["old"], advantage, weight, unit, coefficient, kl_weight=kl_weight
    )
    expected = 0
    for number in range(3):
        delta = sum(coefficient[n] * (other[n] - c["old"][n]) for n in range(12) if unit[n] == number)
        ratio = torch.exp(delta)
        surrogate = torch.min(ratio * advantage[number], ratio.clamp(0.8, 1.2) * advantage[number])
        expected = expected - weight[number] * surrogate + 0.5 * kl_weight[number] * delta**2 / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, one)[0], torch.autograd.grad(expected, other)[0])
    assert metrics["targets"] == 12 and metrics["units"] == 3


def test_weights_of_whole_responses_and_of_slices() -> None:
    counts = [Counts(3, 1, 2, 3), Counts(6, 1, 3, 5)]
    assert unit_weights(counts, "response", 10, whole=True).tolist() == [0.5, 0.5]
    assert unit_weights(counts, "token", 10, whole=True).tolist() == pytest.approx([3 / 9, 6 / 9])
    assert unit_weights(counts, "slice", 10).tolist() == pytest.approx([1 / 5, 1 / 5])
    assert unit_weights(counts, "longest", 7, draws=2).tolist() == pytest.approx([1 / 28, 1 / 28])
