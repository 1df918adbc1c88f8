from __future__ import annotations

import numpy as np
import pytest

from megatron_dlm.diffusion.trace import SamplingParams, shrink
from tests.diffusion.oracles import merged_steps, random_trace


def test_shrinkage_one_changes_nothing() -> None:
    steps = np.array([4, 1, 2, 2, 9])
    assert shrink(steps, 1).tolist() == steps.tolist()


def test_two_windows_of_the_reference() -> None:
    """What the published implementation of TraceRL makes of them."""
    assert shrink(np.array([1, 2, 1, 3]), 2).tolist() == [2, 2, 2, 3]
    assert shrink(np.array([4, 4, 5, 6]), 2).tolist() == [5, 5, 5, 6]


@pytest.mark.parametrize("shrinkage", [1, 2, 3, 8, 100])
def test_shrink_against_grouping_by_hand(shrinkage: int) -> None:
    rng = np.random.default_rng(shrinkage)
    for _ in range(100):
        steps = rng.integers(1, 30, rng.integers(1, 25))
        before = steps.copy()
        assert shrink(steps, shrinkage).tolist() == merged_steps(steps.tolist(), shrinkage)
        assert (steps == before).all()


def test_a_window_that_is_wide_enough_becomes_one_step() -> None:
    assert shrink(np.array([5, 3, 9, 3]), 3).tolist() == [9, 9, 9, 9]


def test_the_parts_of_a_trace_join_up() -> None:
    trace = random_trace(5, 9, 4, np.random.default_rng(0))
    assert len(trace.tail_ids) == 2
    assert trace.tokens.tolist() == [*trace.prompt_ids, *trace.response_ids, *trace.tail_ids]
    assert trace.all_steps.tolist() == [*trace.steps, *trace.tail_steps]
    assert trace.num_steps == trace.num_forwards


def test_the_step_count_includes_the_tail() -> None:
    trace = random_trace(4, 1, 4, np.random.default_rng(0))
    trace.steps, trace.tail_steps = np.array([1]), np.array([2, 3, 3])
    assert trace.num_steps == 3
    trace.steps, trace.tail_steps = np.array([], dtype=np.int64), np.array([], dtype=np.int64)
    assert trace.num_steps == 0


def test_greedy_is_judged_at_temperature_one() -> None:
    assert SamplingParams(temperature=0).policy_temperature == 1
    assert SamplingParams(temperature=0.7).policy_temperature == 0.7
