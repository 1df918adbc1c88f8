"""The TraceRL loop on one process, with a scorer that reads nothing but the words of the response."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from megatron_dlm.config.errors import TrainingError
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.run import TrainingRunConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.training.pace import Pace
from tests.tiny import disturb, make_session, quiet

STOPS = list(range(40, 50))
ROLLOUT = RolloutConfig(
    rollout_batch_size=6,
    n_samples_per_prompt=8,
    rollout_max_response_len=9,
    stop_token_ids=STOPS,
    threshold=0.5,
    max_running_requests=64,
)
RL = RLConfig(
    num_steps_per_rollout=2, max_tokens_per_row=256, overlong_margin=0, min_group_accuracy=0.05, max_group_accuracy=0.95
)


class EvenFirst:
    """Right if the first word is even."""

    def score(self, items):
        return [Verdict(float(self.right(text)), "") for _, text in items]

    def right(self, text: str) -> bool:
        return bool(text) and int(text.split()[0]) % 2 == 0


class Always(EvenFirst):
    def __init__(self, value: bool) -> None:
        self.value = value

    def right(self, text: str) -> bool:
        return self.value


def prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(f"p{n:02}", tuple(rng.integers(0, 40, 2 + n % 5).tolist()), "", "", "math") for n in range(count)]


def make_trainer(
    scorer=None,
    rl: RLConfig = RL,
    rollout: RolloutConfig = ROLLOUT,
    progress: dict | None = None,
    lr: float = 2e-3,
    count: int = 13,
    optimizer: OptimizerConfig | None = None,
):
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig

    session = make_session()
    state = session.train_state(optimizer or OptimizerConfig(lr=lr, clip_grad=1.0), 100)
    disturb(state.module, 0)
    rig = RolloutRig.open(session, state, rollout, 6, rollout.rollout_max_response_len)
    return TraceRLTrainer(
        session, state, rig, scorer or EvenFirst(), prompts(count), rl, rollout, seed=5, progress=progress
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.state.named_parameters()}


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_a_step_says_what_happened() -> None:
    trainer = make_trainer()
    metrics = trainer.step(quiet())
    assert trainer.step_index == 1 and trainer.rig.engine.weight_version == 2  # the first refit was at the start
    assert all(np.isfinite(value) for value in metrics.values())
    assert 0 < metrics["rollout/reward"] <= metrics["rollout/raw_reward"] < 1
    assert 0 < metrics["rollout/learned_ratio"] <= 1
    assert 1 <= metrics["rollout/response_len/mean"] <= 9
    assert (
        0.25 < metrics["rollout/tokens_per_step"] <= 4
    )  # below 1 is possible: steps on the rest of the terminal block count, its tokens do not
    assert metrics["rollout/tokens_per_forward"] == metrics["rollout/tokens_per_step"]
    assert metrics["train/updates"] == 2 and metrics["train/targets"] > 48
    assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-5
    assert metrics["train/ratio"] == pytest.approx(1, abs=0.05) and metrics["train/k3"] >= 0
    assert metrics["train/ratio"] < metrics["train/ratio_max"]
    assert 0 < metrics["train/entropy"] < np.log(51)
    assert metrics["train/grad_norm"] > 0


def test_the_first_update_is_on_policy() -> None:
    metrics = make_trainer(rl=dataclasses.replace(RL, num_steps_per_rollout=1)).step(quiet())
    assert metrics["train/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["train/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["train/k3"] == pytest.approx(0, abs=1e-8) and metrics["train/pg_clipfrac"] == 0


def test_rewards_rise() -> None:
    trainer = make_trainer()
    rewards = [trainer.step(quiet())["rollout/reward"] for _ in range(14)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15, rewards


def test_a_run_repeats() -> None:
    one, other = make_trainer(), make_trainer()
    for _ in range(2):
        assert comparable(one.step(quiet())) == comparable(other.step(quiet()))


def test_a_resumed_run_draws_what_the_next_step_would_have_drawn() -> None:
    """Without learning, so that only the place in the run matters."""
    whole = make_trainer(Always(False))
    whole.step(quiet())
    resumed = make_trainer(Always(False), progress=json.loads(json.dumps(whole.progress())))
    assert comparable(whole.step(quiet())) == comparable(resumed.step(quiet()))


def test_the_same_prompts_get_other_responses_in_another_step() -> None:
    trainer = make_trainer(Always(False), count=6)
    one, other = trainer.step(quiet()), trainer.step(quiet())
    assert other["rollout/response_len/mean"] != one["rollout/response_len/mean"]


@pytest.mark.parametrize("band", [dict(), dict(min_group_accuracy=0.0, max_group_accuracy=1.0)])
def test_nothing_is_learned_where_all_are_alike(band: dict) -> None:
    trainer = make_trainer(Always(False), rl=dataclasses.replace(RL, **band))
    before = weights(trainer)
    metrics = trainer.step(quiet())
    assert metrics["rollout/learned_ratio"] == 0 and not any(name.startswith("train/") for name in metrics)
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())
    assert trainer.step_index == 1 and metrics["rollout/raw_reward"] == 0


def test_truncated_responses_earn_nothing() -> None:
    """Every response is right, those that were cut excepted: reward is one minus the share that was cut."""
    metrics = make_trainer(Always(True)).step(quiet())
    assert 0 < metrics["rollout/truncated_ratio"] < 1
    assert metrics["rollout/raw_reward"] == 1
    full = 1 - metrics["rollout/reward"]
    assert (
        full >= metrics["rollout/truncated_ratio"] - 1e-12
    )  # a stop token in the last place is as long as a cut response


def test_every_prompt_comes_once_in_a_step_and_all_come() -> None:
    trainer, seen = make_trainer(), set()
    for _ in range(12):
        keys = [prompt.key for prompt in trainer.supply.sampler.take_distinct(6)]
        assert len(set(keys)) == len(keys) == 6
        seen |= set(keys)
    assert len(seen) == 13


def test_rollout_log_probabilities_give_the_same_update() -> None:
    computed, taken = make_trainer(), make_trainer(rl=dataclasses.replace(RL, old_logprobs="rollout"))
    one, other = computed.step(quiet()), taken.step(quiet())
    assert other["train/train_rollout_logprob_abs_diff"] < 1e-5
    for name in ("train/loss", "train/grad_norm", "train/entropy", "train/ratio"):
        assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("settings", [dict(max_tokens_per_row=96), dict(max_tokens_per_row=4096)])
def test_the_row_budget_changes_nothing(settings: dict) -> None:
    rl = dataclasses.replace(RL, num_steps_per_rollout=1)
    one, other = (
        make_trainer(rl=rl, lr=1e-5).step(quiet()),
        make_trainer(rl=dataclasses.replace(rl, **settings), lr=1e-5).step(quiet()),
    )
    for name in ("train/loss", "train/grad_norm", "train/entropy", "train/targets"):
        assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("size, updates", [(48, 1), (16, 3), (7, 7)])
def test_the_size_of_an_update_can_be_given_in_responses(size: int, updates: int) -> None:
    rl = dataclasses.replace(
        RL, num_steps_per_rollout=None, global_batch_size=size, min_group_accuracy=0.0, max_group_accuracy=1.0
    )
    metrics = make_trainer(rl=rl).step(quiet())
    learned = round(metrics["rollout/learned_ratio"] * 48)
    assert metrics["train/updates"] == -(-learned // size) and (learned < 48 or metrics["train/updates"] == updates)


def test_run_saves_evaluates_and_records(tmp_path) -> None:
    trainer = make_trainer(rl=dataclasses.replace(RL, num_rollout=2, save_debug_rollout_data=str(tmp_path / "dump")))
    saved, evaluated = [], []

    def evaluate(step: int) -> dict[str, float]:
        evaluated.append(step)
        return {"eval/dynamic/accuracy": 0.5} if step == 2 else {}

    with quiet(metrics_jsonl=str(tmp_path / "metrics.jsonl")) as report:
        trainer.run(report, Pace(TrainingRunConfig(), lambda *call: saved.append(call)), evaluate)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "rollout/reward" in record] == [1, 2]
    assert records[-1]["eval/dynamic/accuracy"] == 0.5 and evaluated[-2:] == [1, 2]
    assert records[-1]["perf/eval_time"] >= 0 and not any("perf/eval_time" in record for record in records[:-1])
    assert saved == [(1, False), (2, False), (2, True)]
    lines = [
        json.loads(line) for file in sorted((tmp_path / "dump").iterdir()) for line in file.read_text().splitlines()
    ]
    assert len(lines) == 2 * 48
    assert all(len(line["token_ids"]) == len(line["step_map"]) > 0 for line in lines)
    assert np.mean([line["correct"] for line in lines[:48]]) == pytest.approx(
        next(record["rollout/raw_reward"] for record in records if record["step"] == 1)
    )


def test_a_run_that_finds_nothing_to_learn_saves_and_gives_up() -> None:
    trainer, saved = make_trainer(Always(False), rl=dataclasses.replace(RL, num_rollout=9, max_empty_steps=3)), []
    with pytest.raises(TrainingError, match="in 3 RL steps in a row .right answers in the last: 0.0%"):
        trainer.run(quiet(), Pace(TrainingRunConfig(), lambda *call: saved.append(call)), None)
    assert trainer.step_index == 3 and saved[-1] == (3, True)


def test_steps_without_anything_to_learn_must_follow_each_other() -> None:
    class Now(EvenFirst):
        calls = 0

        def score(self, items):
            self.calls += 1
            if self.calls % 3 == 0:
                return super().score(items)
            return Always(False).score(items)

    trainer = make_trainer(Now(), rl=dataclasses.replace(RL, num_rollout=6, max_empty_steps=3))
    trainer.run(quiet(), Pace(TrainingRunConfig(), lambda *call: None), None)
    assert trainer.step_index == 6
