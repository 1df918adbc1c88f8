"""When a run saves and stops."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from megatron_dlm.config.errors import Interrupted
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.training.pace import Pace
from tests.harness import pool
from tests.tiny import one_process


def run(pace: Pace, steps: int, on_step=lambda step: None) -> int:
    one_process()
    step = 0
    with pace:
        while step < steps:
            step += 1
            on_step(step)
            if pace.after(step):
                break
        pace.finish(step)
    return step


def make(**settings: object) -> tuple[Pace, list, list]:
    saved, said = [], []
    return Pace(TrainingRunConfig(**settings), lambda *call: saved.append(call), said.append), saved, said


def test_to_the_end() -> None:
    pace, saved, said = make()
    assert run(pace, 3) == 3 and saved == [(1, False), (2, False), (3, False), (3, True)] and said == []


def test_exit_interval() -> None:
    pace, saved, said = make(exit_interval=4)
    assert run(pace, 9) == 4 and saved[-2:] == [(4, True), (4, True)]
    assert said == ["Stopping after --exit-interval 4, at step 4."]


def test_exit_duration() -> None:
    pace, saved, said = make(exit_duration_in_mins=1e-9)
    assert run(pace, 9) == 1 and (1, True) in saved and said[0].startswith("Stopping after 0.0 minutes")


def test_an_exit_metric_ends_the_run_and_is_remembered() -> None:
    one_process()
    pace, saved, said = make(exit_metric="eval/accuracy", exit_metric_at_least=0.5)
    seen = [{}, {"eval/accuracy": 0.4}, {"train/loss": 9.0}, {"eval/accuracy": float("nan")}, {"eval/accuracy": 0.5}]
    with pace:
        assert [pace.after(step, metrics) for step, metrics in enumerate(seen, start=1)] == [False] * 4 + [True]
    assert saved[-1] == (5, True) and said == ["Stopping because eval/accuracy has reached 0.5 (0.5), at step 5."]
    assert pace.progress() == {"exit_metric": {"metric": "eval/accuracy", "value": 0.5, "step": 5}}
    assert make()[0].progress() == {}


def test_a_run_that_has_ended_so_knows_it() -> None:
    from megatron_dlm.commands.common import ended_before

    said = []
    report = SimpleNamespace(say=said.append)
    restored = {"exit_metric": {"metric": "m", "value": 0.6, "step": 5}}
    asks = lambda **settings: ended_before(report, TrainingRunConfig(**settings), restored)
    assert asks(exit_metric="m", exit_metric_at_least=0.5) and "reached 0.6 at step 5" in said[0]
    assert not asks(exit_metric="m", exit_metric_at_least=0.7), "more is asked for"
    assert not asks(exit_metric="n", exit_metric_at_least=0.5) and not asks()
    assert not ended_before(report, TrainingRunConfig(exit_metric="m", exit_metric_at_least=0.5), {})


def test_sigterm_ends_the_step_at_hand_and_saves() -> None:
    before = signal.getsignal(signal.SIGTERM)
    pace, saved, said = make()
    steps = []

    def on_step(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        steps.append(step)  # the signal has come, and the step goes on

    with pytest.raises(Interrupted) as stop:
        run(pace, 9, on_step)
    assert steps == [1, 2] and saved == [(1, False), (2, True), (2, True)] and stop.value.signum == signal.SIGTERM
    assert said == ["Stopping on SIGTERM, at step 2."] and signal.getsignal(signal.SIGTERM) is before


def one_rank_gets_a_signal() -> list:
    import torch.distributed as dist

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize

    initialize(ParallelConfig(), seed=1)
    saved: list = []
    try:
        with Pace(TrainingRunConfig(), lambda *call: saved.append(call)) as pace:
            for step in (1, 2, 3, 4):
                if step == 3 and dist.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if pace.after(step):
                    break
            pace.finish(step)
    except Interrupted:
        return saved
    return []


def test_all_ranks_stop_at_the_same_step() -> None:
    assert pool(2).run(one_rank_gets_a_signal) == [[(1, False), (2, False), (3, True), (3, True)]] * 2
