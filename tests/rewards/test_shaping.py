"""Rewards of length, against their formulas written out for one response at a time."""

from __future__ import annotations

import random

import pytest

from megatron_dlm.rewards.shaping import overlong_penalty, short_reward


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (60, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (130, -1)]
)
def test_the_penalty_grows_over_the_buffer(length, penalty):
    assert overlong_penalty([length], 100, 20).tolist() == [pytest.approx(penalty)]


def test_without_a_buffer_there_is_no_penalty():
    assert overlong_penalty([1, 100, 200], 100, 0).tolist() == [0, 0, 0]


def test_a_right_response_gains_by_being_short_and_a_wrong_one_never():
    rewards = short_reward([10, 20, 30, 10, 20, 30], [1, 1, 1, 0, 0, 0])
    assert rewards.tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, -0.5]


@pytest.mark.parametrize("correct", [[1, 1], [0, 0], [1, 0]])
def test_equal_lengths_are_worth_nothing(correct):
    assert short_reward([7, 7], correct).tolist() == [0, 0]


def test_the_formula_for_any_group():
    random.seed(3)
    for _ in range(50):
        size = random.randint(2, 9)
        lengths, correct = random.choices(range(1, 99), k=size), random.choices([0.0, 1.0], k=size)
        found = short_reward(lengths, correct)
        for length, right, reward in zip(lengths, correct, found, strict=True):
            expected = 0.0
            if min(lengths) != max(lengths):
                expected = 0.5 - (length - min(lengths)) / (max(lengths) - min(lengths))
                expected = expected if right else min(0.0, expected)
            assert reward == pytest.approx(expected)
