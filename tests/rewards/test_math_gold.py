"""Verdicts on the answers of published test sets, and on many at once."""

from __future__ import annotations

import json
import re

import pytest

from megatron_dlm.rewards.math import judge, prepare
from megatron_dlm.rewards.scorers import make_scorer
from tests.rewards.test_math import TEST_DATA, _ask

pytest.importorskip("math_verify")
SETS = ["gsm8k_test.jsonl", "math500.jsonl", "aime24.jsonl", "aime25.jsonl", "amc23.jsonl"]
_DIGITS = re.compile(r"\d+")


@pytest.fixture(scope="module", autouse=True)
def warm():
    prepare()


def truths(name: str) -> list[str]:
    path = TEST_DATA / name
    if not path.is_file():
        pytest.skip(f"no {name} in MEGATRON_DLM_TEST_DATA")
    return [json.loads(line)["ground_truth_answer"] for line in path.read_text(encoding="utf-8").splitlines()]


def perturbed(truth: str) -> list[str]:
    """The answer with one of its numbers larger by one, each in turn; without a number, another answer."""
    changed = [
        truth[: found.start()] + str(int(found[0]) + 1) + truth[found.end() :] for found in _DIGITS.finditer(truth)
    ]
    return changed or [f"{truth} + 1", "7"]


def boxed(answer: str) -> str:
    return f"Therefore the answer is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize("name", SETS)
def test_every_answer_is_equal_to_itself(name):
    wrong = [truth for truth in truths(name) if not judge(boxed(truth), truth, {}).correct]
    assert wrong == []


@pytest.mark.parametrize("name", SETS)
def test_every_answer_is_different_from_a_perturbed_one(name):
    accepted = [
        (truth, other)
        for truth in dict.fromkeys(truths(name))
        for other in perturbed(truth)
        if judge(boxed(other), truth, {}).correct
    ]
    assert accepted == []


@pytest.mark.parametrize(
    ("truth", "answer", "correct"),
    [
        ("52_8", "52_8", 1),
        ("52_8", "52_{8}", 1),
        ("52_8", "52_{\\text{8}}", 1),
        ("52_8", "$52_8$", 1),
        ("52_8", "52_9", 0),
        ("52_8", "53_8", 0),
        ("52_8", "52", 1),
        ("2516_8", "2,516_{8}", 1),
        ("1A_{16}", "1A_{16}", 1),
        ("1A_{16}", "1B_{16}", 0),
        ("15\\mbox{ cm}^2", "15 \\text{ cm}^2", 1),
        ("15\\mbox{ cm}^2", "15 \\text{ cm}^{2}", 1),
        ("15\\mbox{ cm}^2", "15 cm^2", 1),
        ("15\\mbox{ cm}^2", "15", 1),
        ("15\\mbox{ cm}^2", "15 \\text{ cm}^3", 0),
        ("15\\mbox{ cm}^2", "15 cm^{3}", 0),
        ("15\\mbox{ cm}^2", "16 \\text{ cm}^2", 0),
        ("x^2", "x^3", 0),
        ("3x^2", "3x^{2}", 1),
    ],
)
def test_bases_and_powers_of_units(truth, answer, correct):
    assert judge(boxed(answer), truth, {}).correct == correct


def many() -> list[tuple[str, str]]:
    """1,024 pairs of an answer and a ground truth, right and wrong ones: many whole numbers, and some of all kinds."""
    pairs = [(f"{n:,}" if n % 5 else f"x = {n}.", f"{n - n % 2}") for n in range(832)]
    for n in range(1, 65):
        pairs += [
            (f"\\frac{{{n}}}{{{n % 7 + 2}}}", f"{n}/{n % 7 + 2 + n % 3 // 2}"),
            (f"{n / 4}", f"\\frac{{{n}}}{{{4 + n % 2}}}"),
            (f"({n % 5}, {n % 3})", f"\\left({n % 5}, {n % 4}\\right)"),
        ]
    return pairs


def test_many_at_once_get_the_verdicts_that_they_get_one_by_one():
    pairs = many()
    assert len(pairs) == 1024
    alone = [judge(boxed(answer), truth, {}) for answer, truth in pairs]
    with make_scorer("math", workers=2, timeout=20.0) as scorer:
        together = scorer.score([(_ask(truth), boxed(answer)) for answer, truth in pairs])
    assert together == alone
    assert 250 < sum(verdict.correct for verdict in alone) < 875
    assert {verdict.reason for verdict in alone} == {"match", "mismatch"}
