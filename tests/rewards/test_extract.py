"""Where the answer stands."""

from __future__ import annotations

import pytest

from megatron_dlm.rewards.extract import last_boxed, last_line, last_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{4}, no, \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}} and so on {x}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5}", "5"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"\boxed{}", ""),
        (r"\\boxed{5}", None),  # an escaped backslash: no box
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        ("", None),
        ("5", None),
        ("\\", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{" * 100_000, "{" * 300_000 + r"\boxed{5", "}" * 300_000, "\\" * 300_001])
def test_hostile_texts_take_no_time(text):
    assert last_boxed(text) is None  # quadratic scanning would take hours here


def test_deep_nesting():
    deep = "{" * 10_000 + "}" * 10_000
    assert last_boxed(rf"\boxed{{{deep}}}") == deep


@pytest.mark.parametrize(
    ("text", "line", "number"),
    [
        ("a\n 5 apples \n\n", "5 apples", "5"),
        ("", None, None),
        ("no", "no", None),
        ("1,234.5 or -3/4", "1,234.5 or -3/4", "-3/4"),
        ("x 1,234", "x 1,234", "1234"),
    ],
)
def test_last_line_and_number(text, line, number):
    assert (last_line(text), last_number(text)) == (line, number)
