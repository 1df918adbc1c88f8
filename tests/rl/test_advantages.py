from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.rl.advantages import group_advantages, in_band, overlong, speed_advantages


def test_the_example_of_the_specification() -> None:
    """Three of eight right (population standard deviation)."""
    found = group_advantages([1, 1, 0, 0, 0, 1, 0, 0])
    np.testing.assert_allclose(
        found, [1.29099, 1.29099, -0.774597, -0.774597, -0.774597, 1.29099, -0.774597, -0.774597], atol=1e-5
    )


@pytest.mark.parametrize("rewards", [[1, 0], [1, 0, 0, 0], [0.3, 0.9, 0.1, 0.1], [1, 1, 1, 0]])
def test_is_the_z_score_of_the_group(rewards: list[float]) -> None:
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    np.testing.assert_allclose(
        group_advantages(rewards), [(reward - mean) / deviation for reward in rewards], atol=1e-12
    )
    np.testing.assert_allclose(
        group_advantages(rewards, normalize_by_std=False), [reward - mean for reward in rewards], atol=1e-12
    )


@pytest.mark.parametrize("rewards", [[0, 0, 0], [1, 1], [0.1] * 3, [1]])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_teach_nothing(rewards: list[float], normalize: bool) -> None:
    found = group_advantages(rewards, normalize)
    assert np.isfinite(found).all() and np.abs(found).max() < 1e-12


@pytest.mark.parametrize(
    "right, kept", [(0, False), (1, False), (2, True), (5, True), (8, True), (9, False), (10, False)]
)
def test_the_band_holds_its_ends(right: int, kept: bool) -> None:
    assert in_band([1.0] * right + [0.0] * (10 - right), 0.2, 0.8) is kept


def test_a_response_near_the_limit_is_too_long() -> None:
    assert overlong([1, 94, 95, 96, 100], 100, 5).tolist() == [False, False, True, True, True]
    assert overlong([99, 100], 100, 0).tolist() == [False, True]


def slow_z_scores(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    return [(value - mean) / deviation for value in values]


def test_speed_is_compared_within_the_group() -> None:
    found = speed_advantages([1.0, 2.0, 4.0, 1.0], [1, 0, 1, 0])
    np.testing.assert_allclose(found, slow_z_scores([1.0, 2.0, 4.0, 1.0]), atol=1e-12)


def test_only_right_responses_may_be_compared() -> None:
    found = speed_advantages([1.0, 9.0, 4.0, 2.0], [1, 0, 1, 1], only_correct=True)
    first, third, fourth = slow_z_scores([1.0, 4.0, 2.0])
    np.testing.assert_allclose(found, [first, 0.0, third, fourth], atol=1e-12)
    assert speed_advantages([1.0, 9.0], [0, 0], only_correct=True).tolist() == [0, 0]
    assert speed_advantages([1.0, 9.0], [1, 0], only_correct=True).tolist() == [0, 0]


@pytest.mark.parametrize("spread, counts", [(0.0, False), (0.0099, False), (0.0101, True)])
def test_nearly_equal_speeds_teach_nothing(spread: float, counts: bool) -> None:
    assert bool(speed_advantages([2.0, 2.0 + spread], [1, 1], min_range=0.01).any()) is counts
    assert not speed_advantages([2.0, 2.0], [1, 1], min_range=0.0).any()
