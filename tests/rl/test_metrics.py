"""Means over the responses of a step, of a few written out by hand; tests/rl/test_samples.py has a real step."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.diffusion.planner import Load
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rl.metrics import console, learned_metrics, rollout_metrics, staleness_metrics
from megatron_dlm.rl.normalise import Counts


def graded(group: str, sample: int, reward: float, length: int, steps: int = 2, correct: float = 1.0) -> Graded:
    return Graded(
        group=group, sample=sample, owner=0, index=0, correct=correct, reward=reward, length=length, steps=steps,
        forwards=steps + 1, truncated=length == 9, overlong=correct != reward, judge_failed=False,
        load=Load(group, 0, length), counts=Counts(length, length, 1, length),
    )  # fmt: skip


RESPONSES = [
    *(graded("right", n, 1.0, 4) for n in range(2)),
    *(graded("wrong", n, 0.0, 6, correct=0.0) for n in range(2)),
    graded("mixed", 0, 1.0, 1),
    graded("mixed", 1, 0.0, 9, steps=8),
]


def test_groups_whose_rewards_are_all_equal_teach_nothing() -> None:
    metrics = rollout_metrics(RESPONSES)
    assert metrics["rollout/zero_std_ratio"] == pytest.approx(2 / 3)
    assert metrics["rollout/group_reward_std"] == pytest.approx(0.5 / 3)
    assert metrics["rollout/reward"] == 0.5 and metrics["rollout/raw_reward"] == pytest.approx(4 / 6)


def test_tests_are_counted_where_programs_are_judged() -> None:
    assert "rollout/tests_passed_ratio" not in rollout_metrics(RESPONSES)
    shares = [0.5, 0.0, None, None, 1.0, None]
    responses = [dataclasses.replace(one, tests_passed=share) for one, share in zip(RESPONSES, shares)]
    assert rollout_metrics(responses)["rollout/tests_passed_ratio"] == pytest.approx(0.5)


def test_lengths_and_speeds() -> None:
    metrics = rollout_metrics(RESPONSES)
    lengths = {name.split("/")[-1]: value for name, value in metrics.items() if "response_len" in name}
    assert lengths == {"mean": 5.0, "min": 1.0, "p50": 5.0, "p90": 7.5, "max": 9.0}
    assert metrics["rollout/tokens"] == 30
    assert metrics["rollout/tokens_per_step"] == pytest.approx(30 / 18)
    assert metrics["rollout/tokens_per_forward"] == pytest.approx(30 / 24)
    assert metrics["rollout/truncated_ratio"] == metrics["rollout/overlong_ratio"] == pytest.approx(1 / 6)


def test_how_old_a_step_is() -> None:
    ages = [dict(continued=True, stale=3, version_lag=5, largest_lag=2), dict(continued=True), dict(), dict()]
    responses = [dataclasses.replace(graded("g", n, 1.0, 5), **age) for n, age in enumerate(ages)]
    assert staleness_metrics(responses, 7) == {
        "rollout/aborted": 7.0,
        "rollout/partial_ratio": 0.5,
        "rollout/stale_token_ratio": 3 / 20,
        "rollout/version_lag_mean": 5 / 20,
        "rollout/version_lag_max": 2.0,
    }


def test_what_is_learned() -> None:
    assert learned_metrics({("a", 0): 3.0, ("a", 1): -1.0}, 8) == {
        "rollout/learned_ratio": 0.25, "rollout/advantages/mean": 1.0, "rollout/advantages/std": 2.0
    }  # fmt: skip
    assert learned_metrics({}, 8) == {"rollout/learned_ratio": 0.0}


def test_the_log_line_shows_what_there_is() -> None:
    metrics = {"rollout/raw_reward": 0.5, "train/k3": 0.1, "perf/step_time": 2.0, "rollout/tokens": 7.0}
    evaluated = {"eval/static/accuracy": 0.25, "eval/static/response_len": 9.0}
    assert console(metrics | evaluated) == {
        "accuracy": 0.5, "k3": 0.1, "step (s)": 2.0, "eval/static/accuracy": 0.25
    }  # fmt: skip
