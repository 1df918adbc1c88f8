"""Scorers by name, and prompts that name their own verifier."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.data.reasoning_gym import generate
from megatron_dlm.rewards.reasoning_gym import judge
from megatron_dlm.rewards.scorers import VERIFIERS, check_verifiers, make_scorer


def _generated(name, n=5):
    return [
        Prompt(task.question, (), task.question, task.answer, "reasoning_gym", task.metadata)
        for task in generate(f"reasoning_gym:{name}?size={n}&seed=1")
    ]


@pytest.mark.parametrize("form", ["\\boxed{{{}}}", "I think it is\n{}", "So the result is {}."])
def test_generated_answers(form):
    pytest.importorskip("reasoning_gym")
    for prompt in _generated("chain_sum"):
        assert judge(form.format(prompt.ground_truth), prompt.ground_truth, prompt.metadata)[:2] == (1.0, "match")
        assert judge(form.format(int(prompt.ground_truth) + 1), prompt.ground_truth, prompt.metadata)[:2] == (
            0.0,
            "mismatch",
        )
        assert judge("", prompt.ground_truth, prompt.metadata)[:2] == (0.0, "no answer")


def test_partial_scores_are_not_correct():
    pytest.importorskip("reasoning_gym")
    (prompt,) = _generated("chain_sum", 1)
    assert judge(f"\\boxed{{{prompt.ground_truth} and more}}", "", prompt.metadata).correct == 0.0


def test_the_generator_decides_not_the_text():
    pytest.importorskip("reasoning_gym")
    for prompt in _generated("countdown"):  # many expressions reach the target; the generator checks the one given
        expression = prompt.metadata["entry"]["metadata"]["expression"]
        assert judge(f"\\boxed{{({expression})}}", "", prompt.metadata).correct == 1.0


def test_a_mixture_keeps_its_order():
    pytest.importorskip("math_verify")
    pytest.importorskip("reasoning_gym")
    sums = _generated("chain_sum", 20)
    files = [Prompt(str(i), (), "", str(i), "math") for i in range(20)]
    items = [
        pair for i in range(20) for pair in ((sums[i], sums[i].ground_truth), (files[i], f"\\boxed{{{i + i % 2}}}"))
    ]
    with make_scorer("auto", workers=1, timeout=20.0) as scorer:
        verdicts = scorer.score(items)
        assert scorer.score([]) == []
    assert [verdict.correct for verdict in verdicts] == [float(k % 2 == 0 or k // 2 % 2 == 0) for k in range(40)]


FILE, MADE = Prompt("f", (), "", "1", "math"), Prompt("g", (), "", "1", "reasoning_gym")


@pytest.mark.parametrize(("name", "prompts"), [
    ("auto", [FILE, MADE]), ("math", [FILE, MADE]), ("reasoning_gym", [MADE]), ("auto", []), ("math", [])
])  # fmt: skip
def test_verifiers_that_can_judge_their_prompts(name, prompts):
    check_verifiers(name, prompts)


@pytest.mark.parametrize("prompts", [[FILE], [MADE, FILE]])
def test_a_generator_judges_only_its_own_prompts(prompts):
    with pytest.raises(ConfigError, match="--reward reasoning_gym judges only prompts that its generator made"):
        check_verifiers("reasoning_gym", prompts)


def test_sentences(monkeypatch):
    with pytest.raises(ConfigError, match="no verifier 'maths'. Use one of auto, math, reasoning_gym"):
        make_scorer("maths", 1, 1.0)
    with pytest.raises(ConfigError, match="0 workers"):
        make_scorer("auto", 0, 1.0)
    with pytest.raises(ConfigError, match="-1 seconds"):
        make_scorer("auto", 1, -1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in [name for name, verifier in VERIFIERS.items() if verifier.package is not None]:
        with pytest.raises(DependencyError, match="pip install"):
            make_scorer(name, 1, 1.0)
        with pytest.raises(DependencyError, match="pip install"):
            check_verifiers("auto", [Prompt("p", (), "", "1", name)])
