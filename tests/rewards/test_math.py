"""The math judge: right answers in other words are right, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from megatron_dlm.data.prompts import Prompt
from megatron_dlm.rewards.math import judge, prepare
from megatron_dlm.rewards.scorers import make_scorer

TEST_DATA = Path(os.environ.get("MEGATRON_DLM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture(scope="module", autouse=True)
def _prepared():
    prepare()


def _boxed(answer, truth):
    return judge(f"So we get $\\boxed{{{answer}}}$.", truth, {})


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("43", "43"),
        ("43", " 43. "),
        ("43", "43.0"),
        ("43", "+43"),
        ("43", "043"),
        ("1,000", "1000"),
        ("1000", "1{,}000"),
        ("18", "\\$18"),
        ("$18$", "18"),
        ("43", "43 apples"),
        ("43", "43 apples."),
        ("100", "100 dollars"),
        ("5\\text{ cm}", "5"),
        ("5", "5\\text{ cm}"),
        ("18", "18 \\text{ km/h}"),
        ("90^\\circ", "90"),
        ("50\\%", "50"),
        ("50\\%", "0.5"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("x = 5", "x=5"),
        ("168", "132+36=168"),
        ("x \\in [-2,7]", "[-2,7]"),
        ("\\frac{1}{2}", "0.5"),
        ("0.5", "\\frac12"),
        ("\\frac{1}{2}", "\\dfrac{2}{4}"),
        ("3/4", "\\frac34"),
        ("4.5", "9/2"),
        ("3\\frac{1}{2}", "3.5"),
        ("0.001", "10^{-3}"),
        ("1500", "1.5 \\times 10^3"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
        ("7 \\text{ and } 9", "9, 7"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{(C)}", "C"),
        ("11:30", "11:30"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ],
)
def test_right(truth, answer):
    assert _boxed(answer, truth).correct == 1.0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("43", "44"),
        ("43", "-43"),
        ("43", "4 3"),
        ("43", ""),
        ("12", "1, 2"),
        ("10", "10, 11"),
        ("5", "5 or 6"),
        ("43", "I think 43"),
        ("6", "six 6"),
        ("(3,4)", "(4,3)"),
        ("[0,1)", "[0,1]"),
        ("\\frac{11}{2}", "\\frac{1}{12}"),
        ("\\text{east}", "west"),
        ("7", "10^{100} \\bmod 7"),
        ("x+1", "x-1"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}"),
        ("0.25", "0.26"),
        ("5", "5x"),
        ("5", "5=6"),
    ],
)
def test_wrong(truth, answer):
    assert _boxed(answer, truth).correct == 0.0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("168", "47+85+36"),
        ("168", "132 + 36"),
        ("5 cm", "2+3"),
        ("-5", "5-10"),
        ("56", "8 \\times 7"),
        ("45", "90/2"),
        ("45", "\\frac{90}{2}"),
        ("0.75", "0.5+0.25"),
    ],
)
def test_an_answer_must_be_worked_out(truth, answer):
    assert _boxed(answer, truth)[:2] == (0.0, "not worked out")
    assert judge(answer, truth, {}).correct == 0.0  # nor without a box


@pytest.mark.parametrize(
    ("response", "truth", "correct"),
    [
        ("The answer is 43.", "43", 1),
        ("so it is $\\frac12$", "0.5", 1),
        ("132+36=168", "168", 1),
        ("first 43, then 44", "43", 0),
        ("", "1", 0),
        ("no idea", "1", 0),
        ("1" * 100_000, "1", 0),
    ],
)
def test_without_a_box(response, truth, correct):
    assert judge(response, truth, {}).correct == correct


def test_the_last_box_counts():
    assert judge("\\boxed{1} then \\boxed{2}", "1", {}).correct == 0.0
    assert judge("\\boxed{1} then \\boxed{2}", "2", {}).correct == 1.0
    assert judge("\\boxed{1}, or 2", "2", {}).correct == 0.0


def _ask(truth):
    return Prompt(truth, (), "", truth, "math")


def _truths(name):
    path = TEST_DATA / name
    if not path.is_file():
        pytest.skip(f"no {name} in MEGATRON_DLM_TEST_DATA")
    return [json.loads(line)["ground_truth_answer"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["math500.jsonl", "gsm8k_test.jsonl", "aime24.jsonl", "amc23.jsonl"])
def test_real_answers(name):
    truths = _truths(name)
    with make_scorer("math", workers=2, timeout=10.0) as scorer:
        right = scorer.score([(_ask(truth), f"so $\\boxed{{{truth}}}$") for truth in truths])
        shifted = list(zip(truths, truths[1:] + truths[:1], strict=True))
        wrong = scorer.score([(_ask(truth), f"so $\\boxed{{{other}}}$") for truth, other in shifted])
    assert sum(verdict.correct for verdict in right) >= 0.99 * len(truths)
    accepted = [pair for pair, verdict in zip(shifted, wrong, strict=True) if verdict.correct and pair[0] != pair[1]]
    assert len(accepted) <= 0.005 * len(truths)  # "5" and "x=5" are neighbours in MATH500


def test_hostile_answers_end_and_disturb_nobody():
    hostile = [
        "10^{10^{10}}",
        "9^{9^{9^{9}}}",
        "10000000!",
        "(" * 400 + "1" + ")" * 400,
        "\\frac{1}{" * 60 + "2" + "}" * 60,
        "{" * 450 + "}" * 450,
        "\\prod_{k=1}^{100000}(x+k)",
        "\\int_0^1 e^{x^{x^x}} dx",
        "(1+x)^{5000}",
        "\x00",
        "9" * 900,
        "9" * 5000,
        "\\sqrt" * 300,
    ]
    responses = [f"\\boxed{{{answer}}}" for answer in hostile] + [
        "\\boxed{",
        "\\boxed{" * 5000,
        "}{" * 5000,
        "$" * 5000,
        "answer is " + "1 " * 3000,
    ]
    easy = [(_ask(str(i)), f"\\boxed{{{i}}}") for i in range(200)]
    with make_scorer("math", workers=2, timeout=1.0) as scorer:
        verdicts = scorer.score(easy[:100] + [(_ask("x+7"), response) for response in responses] + easy[100:])
    assert all(verdict.correct == 1.0 for verdict in verdicts[:100] + verdicts[-100:])
    assert all(verdict.correct == 0.0 for verdict in verdicts[100:-100])
    assert "timeout" in {verdict.reason for verdict in verdicts[100:-100]}  # else these cases test nothing
