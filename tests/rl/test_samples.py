"""What a run leaves to be read of its rollouts, and its metrics, recomputed from all that it generated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.training.report import Report
from tests.harness import pool
from tests.rl.test_trainer import RL, Always, EvenFirst, make_trainer

GROUP, PROMPTS, LIMIT = 8, 6, 9  # of the trainer's rollouts


def run(folder: Path, scorer=None, steps: int = 1, **rl: object) -> list[dict]:
    """RL steps that leave everything: samples in save/, all rollouts in dump/. Returns the metrics of each."""
    settings = dataclasses.replace(RL, save_debug_rollout_data=str(folder / "dump"), **rl)
    trainer = make_trainer(scorer, rl=settings)
    with Report(LoggingConfig(progress_bar=False), True, {}, folder / "save") as report:
        return [trainer.step(report) for _ in range(steps)]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def everything(folder: Path, step: int) -> list[dict]:
    """All responses of a step, with what they earn by the rules written out here. `step` is counted from 0."""
    found = lines(folder / "dump" / f"step_{step:06d}_rank_0000.jsonl")
    assert len(found) == GROUP * PROMPTS
    for line in found:
        line["reward"] = line["correct"] if len(line["token_ids"]) < LIMIT else 0.0
    for start in range(0, len(found), GROUP):
        members = found[start : start + GROUP]
        rewards = [member["reward"] for member in members]
        mean = sum(rewards) / GROUP
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / GROUP) ** 0.5
        for member in members:
            member["deviation"] = deviation
            member["advantage"] = (member["reward"] - mean) / deviation if 0.05 <= mean <= 0.95 else None
    return found


def test_samples_are_the_first_responses_to_different_prompts(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    samples = lines(tmp_path / "save" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1] * 4 + [2] * 4
    for step in (0, 1):
        whole = everything(tmp_path, step)
        for sample, source in zip(samples[4 * step :], whole[::GROUP][:4]):
            assert sample["advantage"] == pytest.approx(source["advantage"])
            assert sample["reward"] == source["reward"]
            for name in ("question", "ground_truth", "response", "correct", "reason", "finish_reason", "step_map"):
                assert sample[name] == source[name], name
            assert sample["length"] == len(source["token_ids"]) == len(sample["step_map"])
            words = [str(token) for token in source["token_ids"] if token < 49]  # 49 ends a response and is not shown
            assert sample["response"] == " ".join(words)
            assert 0 < sample["tokens_per_step"] <= sample["length"] / max(sample["step_map"]) + 1e-3
    assert any(sample["advantage"] is not None for sample in samples)


class Tested(EvenFirst):
    """Each response is a program with two tests, of which it passes the second if it is right."""

    def score(self, items):
        words = ["pass" if self.right(text) else "fail" for _, text in items]
        return [Verdict(0.0, "of 2 tests", (word == "pass") / 2, ("fail", word)) for word in words]


def test_what_each_test_said_is_kept(tmp_path: Path) -> None:
    (metrics,) = run(tmp_path, Tested())
    whole, samples = everything(tmp_path, 0), lines(tmp_path / "save" / "samples.jsonl")
    assert {tuple(line["parts"]) for line in whole} == {("fail", "pass"), ("fail", "fail")}
    for line in [*whole, *samples]:
        assert line["score"] == line["parts"].count("pass") / 2
    assert metrics["rollout/tests_passed_ratio"] == pytest.approx(sum(line["score"] for line in whole) / len(whole))


@pytest.mark.parametrize("count", [0, 1, PROMPTS + 2, 1000])
def test_there_are_as_many_samples_as_asked_for(tmp_path: Path, count: int) -> None:
    run(tmp_path, log_samples=count)
    whole = everything(tmp_path, 0)
    expected = [whole[prompt * GROUP + sample] for sample in range(GROUP) for prompt in range(PROMPTS)][:count]
    file = tmp_path / "save" / "samples.jsonl"
    assert file.exists() == (count > 0)
    found = lines(file) if count else []
    assert [line["step_map"] for line in found] == [line["step_map"] for line in expected]
    assert [line["response"] for line in found] == [line["response"] for line in expected]


def test_a_response_that_nobody_learns_from_has_no_advantage(tmp_path: Path) -> None:
    (metrics,) = run(tmp_path, Always(False))
    assert [line["advantage"] for line in lines(tmp_path / "save" / "samples.jsonl")] == [None] * 4
    assert metrics["rollout/zero_std_ratio"] == 1 and metrics["rollout/group_reward_std"] == 0
    assert not any(name.startswith("rollout/advantages") for name in metrics)


def test_metrics_are_those_of_all_responses(tmp_path: Path) -> None:
    (metrics,) = run(tmp_path, num_steps_per_rollout=1)
    whole = everything(tmp_path, 0)
    lengths = sorted(len(line["token_ids"]) for line in whole)
    learned = [line["advantage"] for line in whole if line["advantage"] is not None]
    between = lambda place: lengths[int(place)] + (place % 1) * (lengths[int(place) + 1] - lengths[int(place)])
    expected = {
        "rollout/response_len/mean": sum(lengths) / 48,
        "rollout/response_len/min": lengths[0],
        "rollout/response_len/max": lengths[-1],
        "rollout/response_len/p50": between(0.5 * 47),
        "rollout/response_len/p90": between(0.9 * 47),
        "rollout/tokens": sum(lengths),
        "rollout/raw_reward": sum(line["correct"] for line in whole) / 48,
        "rollout/reward": sum(line["reward"] for line in whole) / 48,
        "rollout/truncated_ratio": sum(line["finish_reason"] == "length" for line in whole) / 48,
        "rollout/overlong_ratio": sum(length >= LIMIT for length in lengths) / 48,
        "rollout/group_reward_std": sum(line["deviation"] for line in whole[::GROUP]) / PROMPTS,
        "rollout/zero_std_ratio": sum(line["deviation"] == 0 for line in whole[::GROUP]) / PROMPTS,
        "rollout/learned_ratio": len(learned) / 48,
        "rollout/advantages/mean": 0.0,
        "rollout/advantages/std": 1.0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name
    assert 0 < metrics["rollout/group_reward_std"] < 0.5 and 0 < len(learned)
    tokens = metrics["perf/train_tokens_per_sec"] * metrics["perf/train_time"]
    assert tokens == pytest.approx(metrics["train/tokens"]) and tokens > 256  # padding left out


def test_advantages_without_the_division_are_as_wide_as_the_rewards(tmp_path: Path) -> None:
    (metrics,) = run(tmp_path, normalize_advantages_by_std=False)
    widths = [line["deviation"] for line in everything(tmp_path, 0) if line["advantage"] is not None]
    assert metrics["rollout/advantages/std"] == pytest.approx(np.mean(np.square(widths)) ** 0.5)


def on_two_replicas(folder: Path) -> tuple[int, int]:
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig
    from tests.parallel.test_tracerl import make_state
    from tests.rl.test_trainer import ROLLOUT, EvenFirst, prompts

    session, state = make_state({})
    rig = RolloutRig.open(session, state, ROLLOUT, 6, LIMIT)
    trainer = TraceRLTrainer(session, state, rig, EvenFirst(), prompts(13), RL, ROLLOUT, seed=5)
    with Report(LoggingConfig(progress_bar=False), session.groups.is_main, {}, folder) as report:
        metrics = trainer.step(report)
        report.record(1, metrics)
    return rig.num_replicas, rig.replica


def test_of_several_replicas_one_writes(tmp_path: Path) -> None:
    assert pool(2).run(on_two_replicas, tmp_path) == [(2, 0), (2, 1)]
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [1] * 4
    assert len(lines(tmp_path / "metrics.jsonl")) == 1 and (tmp_path / "curves.png").exists()
