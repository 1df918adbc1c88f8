"""Forms and parts of responses, from their traces to the records that all ranks have."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.format import FormatScorer
from megatron_dlm.rewards.process import Scores
from megatron_dlm.rl import earnings
from megatron_dlm.rl.earnings import Earnings, token_rewards
from megatron_dlm.rl.samples import Judged
from tests.rl.test_rewards import graded
from tests.rl.test_trainer import make_trainer
from tests.tiny import quiet

RL = RLConfig(min_group_accuracy=0.2, max_group_accuracy=0.8)


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, ids, skip_special_tokens=False):
        assert skip_special_tokens
        return "".join(chr(token) for token in ids)


class Remembers:
    """A judge that gives each part its length, negative if the outcome is wrong."""

    def __init__(self):
        self.seen = []

    def judge(self, solutions):
        self.seen += solutions
        sign = lambda solution: 1 if solution.correct else -1
        return [Scores(tuple(float(sign(one) * len(part)) for part in one.parts), 1) for one in solutions]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank."""
    monkeypatch.setattr(earnings, "gather_objects", lambda mine: [mine])


def judged(group, sample, text, prompt=3, block=4):
    ids, nothing = np.array([ord(letter) for letter in text]), np.zeros(0)
    trace = Trace(
        np.zeros(prompt, dtype=np.int64), ids, nothing, np.arange(1, len(ids) + 1), nothing, np.zeros(len(ids)),
        np.zeros(len(ids)), np.zeros(len(ids), dtype=np.int64), SamplingParams(block_size=block), group, sample, "stop",
        len(ids),
    )  # fmt: skip
    return Judged(Prompt(group, (), "q", "a", "math"), trace, text, Verdict(1.0, ""))


def of(judge=None, **settings):
    return Earnings(RewardConfig(**settings), Letters(), RL, 100, judge=judge)


def test_rewards_are_shaped_in_their_groups():
    records = [graded(0, 1.0, 10), graded(1, 1.0, 20), graded(0, 1.0, 30, "h"), graded(1, 0.0, 30, "h")]
    found = of(short_reward_coef=1.0).complete(records, [])
    assert [one.reward for one in found] == [1.5, 0.5, 1.0, 0.0]
    assert [dataclasses.replace(one, reward=0.0) for one in found] == records


def test_parts_are_judged_where_there_is_something_to_learn():
    texts = ["abcdefghijk", "xyz"]
    mine = [judged(group, n, text) for group in ("even", "easy") for n, text in enumerate(texts)]
    records = [
        graded(0, 1.0, 11, "easy"), graded(1, 1.0, 3, "easy"), graded(0, 1.0, 11, "even"), graded(1, 0.0, 3, "even")
    ]  # fmt: skip
    judge = Remembers()
    found = of(judge, process_reward="endpoint", process_chunk_tokens=4).complete(records, mine)
    assert [(one.prompt.key, one.parts, one.correct) for one in judge.seen] == [
        ("even", ("abcde", "abcdefghi", "abcdefghijk"), True),  # 3 tokens of the prompt, and 5: two whole blocks
        ("even", ("xyz",), False),
    ]
    assert [one.chunks for one in found] == [(), (), (5.0, 9.0, 11.0), (-3.0,)]
    assert [one.chunks_failed for one in found] == [0, 0, 1, 1]


def test_parts_without_a_grid():
    judge = Remembers()
    records = [graded(0, 1.0, 11), graded(1, 0.0, 3)]
    of(judge, process_reward="endpoint", process_chunk_tokens=4, process_chunk_grid="token").complete(
        records, [judged("g", 0, "abcdefghijk")]
    )
    assert [one.parts for one in judge.seen] == [("abcd", "abcdefgh", "abcdefghijk")]


@pytest.mark.parametrize("grid, places", [("block", [4, 8, 10]), ("token", [3, 7, 10])])
def test_tokens_are_rewarded_where_the_parts_end(grid, places):
    config = RewardConfig(process_reward="endpoint", process_chunk_tokens=4, process_chunk_grid=grid)
    trace = judged("g", 0, "abcdefghijk").trace
    found = token_rewards(config, (1.0, 2.0, 3.0), trace, trace.steps, np.ones(11, dtype=bool))
    expected = np.zeros(11)
    expected[places] = [1.0, 2.0, 3.0]
    assert found.tolist() == expected.tolist()


def test_rewards_of_tokens_are_those_of_the_chunks_of_the_group():
    settings = {"process_reward": "endpoint", "process_chunk_tokens": 4}
    records = [graded(0, 1.0, 6, chunks=(1.0, 5.0)), graded(1, 0.0, 3, chunks=(0.0,)), graded(0, 1.0, 3, "h")]
    token = of(Remembers(), **settings).token_rewards(records)
    found = []
    for record, text in zip(records, ["abcdef", "abc", "abc"]):
        trace = judged(record.group, record.sample, text).trace
        learned = np.arange(len(text)) != 5
        found.append(token(record, trace, trace.steps, learned).tolist())
    assert found == [[0, 0, 0, 0, 1 + 5, 0], [0, 0, -1], [0, 0, 0]]  # the last token of the first one is not learned
    assert of(**settings).token_rewards(records) is None


def test_metrics():
    records = [graded(0, chunks=(1.0, -1.0, 1.0), chunks_failed=1, form=1.0), graded(1, chunks=(0.0,)), graded(2)]
    both = Earnings(RewardConfig(), Letters(), RL, 100, FormatScorer("boxed", 1, 1.0), Remembers())
    assert both.metrics(records) == {
        "rollout/format_ratio": pytest.approx(1 / 3), "rollout/process_parts": 4.0, "rollout/process_reward": 0.25,
        "rollout/process_failed_ratio": 0.25,
    }  # fmt: skip
    assert of().metrics(records) == {}
    assert of(Remembers()).metrics([graded()]) == {"rollout/process_parts": 0.0}


def test_a_step_of_training_with_all_rewards():
    trainer = make_trainer()
    config = RewardConfig(
        format_reward=r"[\d ]*[02468]", overlong_buffer_len=4, short_reward_coef=0.5, speed_reward_coef=0.5,
        process_reward="endpoint", process_chunk_tokens=3, reward_workers=1,
    )  # fmt: skip
    form, judge = FormatScorer(config.format_reward, 1, 20.0), Remembers()
    with Earnings(config, trainer.collector.tokenizer, trainer.rl, 9, form, judge) as own:
        trainer.collector.earnings, trainer.reward = own, config
        metrics = trainer.step(quiet())
    assert 0 < metrics["rollout/format_ratio"] < 1
    assert metrics["rollout/process_parts"] == sum(len(one.parts) for one in judge.seen) > 0
    assert metrics["rollout/process_failed_ratio"] == len(judge.seen) / metrics["rollout/process_parts"]
    assert metrics["rollout/group_reward_std"] > 0 and metrics["rollout/learned_ratio"] > 0
    assert np.isfinite(list(metrics.values())).all()


def test_forms():
    with_form = Earnings(RewardConfig(), Letters(), RL, 100, form=FormatScorer("boxed", 1, 1.0))
    assert with_form.forms(["\\boxed{1}", "1"]) == [1.0, 0.0]
    assert of().forms(["\\boxed{1}", "1"]) == [0.0, 0.0]
