"""Letters and options, however they are written."""

from __future__ import annotations

import time

import pytest

from megatron_dlm.rewards.multiple_choice import judge

OPTIONS = {"options": ["12", "14", "Paris", "None of these"]}


@pytest.mark.parametrize("known", [{}, OPTIONS])
@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{B}",
        "\\boxed{b}",
        "\\boxed{(B)}",
        "\\boxed{\\text{B}}",
        "\\boxed{\\mathrm{(B)}}",
        "\\boxed{B.}",
        "\\boxed{$B$}",
        "\\boxed{B) 14}",
        "\\boxed{A}, no: \\boxed{B}",
        "\\boxed{Option B}",
        "A is wrong, so \\boxed{B} and not A",
        "Answer: B",
        "answer: (B)",
        "The answer is (B).",
        "**Answer: B**",
        "**Answer:** B",
        "The correct answer is B because 14 is even.",
        "Answer: A\nwait\nAnswer: B",
        "The correct option is B.",
        "It must be that one.\n(B)",
        "B",
        "B.\n",
        "so\nB) 14",
        "The answer is B because option A is wrong.",
        "The answer is B, since choice A fails.",
        "Answer: B\n\nOption A would need a bigger number.",
        "So the answer is B. This is the only choice I can make.",
        "The answer is B.\nI hope this answer helps!",
        "The answer is B, I think.",
        "The answer is B and A is wrong.",
        "The right choice is\n\nB",
        "**Answer**: B",
        "The correct answer: **B) 14**",
        "The answer is option B, as computed",
        "I choose option B, as computed",
        "I take Option (B)",
    ],
)
def test_the_second_option(response, known):
    assert judge(response, "B", known)[:2] == (1.0, "match")
    assert judge(response, "b", known).correct == 1.0
    assert judge(response, "C", known)[:2] == (0.0, "mismatch")


@pytest.mark.parametrize("response", ["\\boxed{14}", "\\boxed{ 14. }", "The answer is 14.", "so\n14", "\\boxed{B}"])
def test_an_option_by_its_text(response):
    assert judge(response, "B", OPTIONS).correct == judge(response, "14", OPTIONS).correct == 1.0
    assert judge(response, "12", OPTIONS).correct == judge(response, "Paris", OPTIONS).correct == 0.0


def test_case_and_spaces_do_not_tell_options_apart():
    assert judge("\\boxed{none  of THESE}", "D", OPTIONS).correct == 1.0
    assert judge("\\boxed{d}", "none of these", OPTIONS).correct == 1.0


def test_options_that_are_letters():
    """A letter is the place of an option, wherever there is such a place, and otherwise its text."""
    blood = {"options": ["B", "A", "AB", "I"]}
    assert judge("\\boxed{B}", "B", blood).correct == 1.0
    assert judge("\\boxed{B}", "A", blood).correct == 0.0
    assert judge("\\boxed{I}", "D", blood).correct == judge("\\boxed{AB}", "C", blood).correct == 1.0


@pytest.mark.parametrize(
    "response",
    ["", " ", "\\boxed{}", "\\boxed{E}", "\\boxed{15}", "\\boxed{AB}", "I think so", "the answer is not A",
     "Answer: E", "Answer: about 14 or so", "A or B", "because of A the other\nones are wrong",
     "\\boxed{A} is not right. \\boxed{?}", "The answer is A or B", "Answer: A, B", "The answer is A and C.",
     "Answer: (A)/(B)", "I would take option A or B", "What a good choice! A fine answer, too", "\\boxed{E} option A"],
)  # fmt: skip
def test_what_names_no_option_is_wrong(response):
    assert judge(response, "A", OPTIONS)[:2] == (0.0, "no answer")


@pytest.mark.parametrize(
    "response", ["answer is " * 50_000, "(" * 500_000, "\\text{" * 100_000, "\\boxed{" + "A " * 200_000 + "}"]
)
def test_long_responses_end(response):
    start = time.process_time()
    assert judge(response, "A", OPTIONS).correct == 0.0
    assert time.process_time() - start < 20  # nothing here grows faster than the text
