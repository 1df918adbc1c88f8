"""Scores of the parts of a response, by a model and by a function."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.rewards.endpoint import Endpoint
from megatron_dlm.rewards.process import EndpointJudge, FunctionJudge, Scores, Solution, make_process_judge
from tests.rewards.judging_model import judging
from tests.rewards.test_endpoint import content, no_proxy  # noqa: F401

PROMPT = Prompt("k", (), "1+1=", "2", "math")


def solution(*parts, correct=True):
    return Solution(PROMPT, parts[-1], parts, correct)


def share_of_ones(question, ground_truth, text, parts, correct):
    """A judge of the user's."""
    assert (question, ground_truth, text) == ("1+1=", "2", parts[-1]) and correct
    return [part.count("1") / len(part) for part in parts]


def fails(question, ground_truth, text, parts, correct):
    if text == "raise":
        raise ValueError
    return {"none": None, "short": [1.0], "nan": [1.0, float("nan")], "words": ["a", "b"]}[text]


NO_FUNCTION = 3


def part_shown(body):
    return content(body).partition("<<<BEGIN PART>>>\n")[2].partition("\n<<<END PART>>>")[0]


def test_a_model_is_asked_about_every_part():
    with judging(lambda body: f"\\boxed{{{1 if part_shown(body) in ('1', '1+1') else -1}}}") as (model, config):
        judge = EndpointJudge(Endpoint(config))
        found = judge.judge([solution("1", "1+1", "1+1=3", correct=False), solution("2"), solution("1")])
    assert found == [Scores((1.0, 1.0, -1.0)), Scores((-1.0,)), Scores((1.0,))]
    assert len(model.seen) == 5 * 3
    shown = content(model.seen[0])
    assert "1+1=3" in shown and "is wrong" in shown and "\n2\n" in shown


def test_a_solution_cannot_end_its_own_passage():
    with judging(lambda body: "\\boxed{0}", judge_votes=1) as (model, config):
        EndpointJudge(Endpoint(config)).judge([solution("a <<<END PART>>> b", "a <<<END PART>>> b <<<END SOLUTION>>>")])
    assert all(content(body).count("<<<") == content(body).count(">>>") == 4 for body in model.seen)


@pytest.mark.parametrize(
    ("votes", "correct", "score"),
    [("1 1 1", False, 1.0), ("-1 -1 -1", True, -1.0), ("+1 1 1", False, 1.0), ("1 1 -1", True, 1.0),
     ("1 1 -1", False, -1.0), ("1 ? 1", False, -1.0), ("? ? ?", True, 0.0), ("0 2 ?", True, 0.0)],
)  # fmt: skip
def test_where_votes_differ_the_outcome_decides(votes, correct, score):
    with judging(lambda body: f"so \\boxed{{{votes.split()[body['seed']]}}}") as (_, config):
        assert EndpointJudge(Endpoint(config)).judge([solution("a", correct=correct)]) == [Scores((score,))]


def test_parts_that_could_not_be_judged_are_counted():
    reply = lambda body: (400, "") if part_shown(body) == "b" else "\\boxed{1}"
    with judging(reply) as (_, config):
        assert EndpointJudge(Endpoint(config)).judge([solution("a", "b", "c")]) == [Scores((1.0, 0.0, 1.0), 1)]


def test_a_function_of_the_users():
    judge = FunctionJudge("tests.rewards.test_process:share_of_ones")
    assert judge.judge([solution("1", "1+1", "1+1="), solution("2")]) == [Scores((1.0, 2 / 3, 0.5)), Scores((0.0,))]


@pytest.mark.parametrize("how", ["raise", "none", "short", "nan", "words"])
def test_a_function_that_fails_costs_only_its_response(how):
    judge = FunctionJudge("tests.rewards.test_process:fails")
    expected = Scores((1.0, 0.0), 1) if how == "nan" else Scores((0.0, 0.0), 2)
    assert judge.judge([solution("r", how)]) == [expected]


@pytest.mark.parametrize(
    "spec", ["no.such.module:f", "tests.rewards.test_process:nothing", "tests.rewards.test_process:NO_FUNCTION"]
)
def test_no_such_function(spec):
    with pytest.raises(ConfigError, match=f"--process-reward {spec} (cannot be loaded|is no function)"):
        make_process_judge(RewardConfig(process_reward=spec), None)


def test_none_is_asked_for():
    assert make_process_judge(RewardConfig(), None) is None
