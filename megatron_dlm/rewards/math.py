"""Is a mathematical answer right?

The answer is the last closed \\boxed{...} of the response; without one, what the math-verify package finds at the
response's end. It is compared

  1. as text, after dropping what cannot change a meaning (spaces, $, \\left, \\text, ...);
  2. as exact integers, when both are;
  3. by math-verify (symbolic, sets, intervals, matrices, units, percent), which can take any time and memory: that is
     for the worker's limits.

What math-verify does not read is compared beforehand: the base of a numeral (52_8) and the power of a unit (15 cm^2),
where both name one.

An answer must be worked out: where the ground truth is a plain number, "47+85+36" is no answer to "47+85+36=", though
it equals 168. Of a chain "132+36=168" the last member is judged. Neither is "90/2" an answer where it is an integer,
while "9/2" is one where it is 4.5.

Invariants (tests/rewards/test_math.py): every ground truth is right against itself; no response raises.
"""

from __future__ import annotations

import logging
import re

from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.extract import last_boxed

MATCH, MISMATCH, NO_ANSWER, NOT_WORKED_OUT = "match", "mismatch", "no answer", "not worked out"
SEARCHED_END = 1000  # characters at the end of a response without a box in which an answer is looked for
LONGEST_ANSWER = 1000  # characters; a longer box is no answer, and parsing it takes minutes

_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)")
_NUMBER = re.compile(r"(?=.*\d)[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?(?:/\d+)?")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm)\{([^{}]*)\}")
_MEANINGLESS = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\?\$")
_LOOSE_SPACE = re.compile(
    r"(?<!\w)\s+|\s+(?!\w)"
)  # "1 2" is not 12; braces stay for the same reason: \frac{1}{12} is not \frac{11}{2}
_UNIT = re.compile(r"\\(?:text|mbox|textbf|mathrm)\{[^{}]*\}|\^\\circ|\^\{\\circ\}|\\?[%$]|[a-zA-Z]+\.?$")
_DOLLAR = re.compile(r"\\?\$")
_LAST_WORD = re.compile(r"(?<=\d)\s+[a-zA-Z]{2,}$")
# A sum, difference or product of two members; scientific notation and signs, as in 10^{-3}, are no such thing.
_SUM_OR_PRODUCT = re.compile(r"[\d)}\]!]\s*(?:[+*×·−-]|\\(?:times|cdot)(?![a-z])(?!\s*10\s*\^))\s*[\d({.\\]")
_IN_BASE = re.compile(r"(\d[\da-zA-Z,]*)_\{?(\d+)\}?")
# A power of a unit: of the ground truth, where nothing but a number stands before it, and of an answer
_UNIT_POWER = re.compile(r"[\d.,\s]+\\(?:text|mbox|textbf|mathrm)\{[^{}]*\}\s*\^\s*\{?(\d+)\}?")
_LAST_POWER = re.compile(r"[a-zA-Z]\s*\}?\s*\^\s*\{?(\d+)\}?$")
_QUOTIENT = re.compile(r"[\d)}\]!]\s*(?:[/÷:]|\\div(?![a-z]))\s*[\d({.\\]|\\[dt]?frac(?![a-z])")


def judge(response: str, ground_truth: str, metadata: dict) -> Verdict:
    """Verdict on one response.

    Args:
        response: its whole text.
        ground_truth: plain text or LaTeX, with or without $...$.
        metadata: not used.

    Source: the answer check of the TraceRL reference (last box, then text, then symbols), with math-verify in the place
        of its own rules.
    """
    truth = ground_truth.strip()
    answer = last_boxed(response)
    if answer is None:
        return _judge_found(_parse(response[-SEARCHED_END:]), truth)
    answer = answer.rstrip(" .")
    if not answer:
        return Verdict(0.0, NO_ANSWER)
    if len(answer) > LONGEST_ANSWER:
        return Verdict(0.0, MISMATCH)
    if _plain(answer) == _plain(truth):
        return Verdict(1.0, MATCH)
    numerals = [_IN_BASE.fullmatch(_plain(text)) for text in (answer, truth)]
    if all(numerals):
        return _verdict(len({(found[1].replace(",", ""), found[2]) for found in numerals}) == 1)
    if _other_unit(answer, truth):
        return Verdict(0.0, MISMATCH)
    number = _number(truth)
    if number is not None:
        answer = _last_member(answer)
        if _unfinished(answer, number):
            return Verdict(0.0, NOT_WORKED_OUT)
    plain_answer, plain_truth = _plain(answer), _plain(truth)
    if _INTEGER.fullmatch(plain_answer) and _INTEGER.fullmatch(plain_truth):
        return _verdict(_integer(plain_answer) == _integer(plain_truth))
    return _compare(_parse_latex(answer), truth)


def _judge_found(answers: list, truth: str) -> Verdict:
    """Verdict on what math-verify found: the expression, and the text it was read from."""
    number = _number(truth)
    if number is not None and any(
        isinstance(answer, str) and _unfinished(_last_member(answer), number) for answer in answers
    ):
        return Verdict(0.0, NOT_WORKED_OUT)
    return _compare(answers, truth)


def _compare(answers: list, truth: str) -> Verdict:
    from math_verify import verify

    if not answers:
        return Verdict(0.0, NO_ANSWER)
    return _verdict(verify(_parse_latex(truth), answers, timeout_seconds=None))


def _other_unit(answer: str, truth: str) -> bool:
    """Whether both name a power of a unit (15 cm^2), and not the same."""
    powers = _LAST_POWER.search(answer.replace("$", "").strip()), _UNIT_POWER.fullmatch(_DOLLAR.sub("", truth).strip())
    return all(powers) and powers[0][1] != powers[1][1]


def _number(truth: str) -> str | None:
    """The ground truth without units, when it is then a plain number (integer, decimal, a/b); else None."""
    number = _plain(_UNIT.sub("", truth))
    return number if _NUMBER.fullmatch(number) else None


def _last_member(answer: str) -> str:
    """What stands behind the last equals sign, without a word for the unit."""
    return _LAST_WORD.sub("", answer.rpartition("=")[2].strip() or answer)


def _unfinished(answer: str, number: str) -> bool:
    """Whether the answer leaves to the reader the arithmetic that leads to the number."""
    return bool(_SUM_OR_PRODUCT.search(answer) or (_INTEGER.fullmatch(number) and _QUOTIENT.search(answer)))


def _plain(text: str) -> str:
    """The text without what cannot change its meaning, for comparison only."""
    text = _TEXT.sub(r"\1", text.strip().rstrip(".").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac"))
    return _LOOSE_SPACE.sub("", _MEANINGLESS.sub("", text))


def _integer(text: str) -> str:
    """A normal form of digits; int() refuses thousands of them."""
    sign = "-" if text.startswith("-") else ""
    digits = text.lstrip("+-").replace(",", "").lstrip("0")
    return sign + digits if digits else "0"


def _verdict(correct: bool) -> Verdict:
    return Verdict(1.0, MATCH) if correct else Verdict(0.0, MISMATCH)


def _parse(text: str) -> list:
    """What math-verify finds in running text; its own limits, which use SIGALRM, are off."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)


def _parse_latex(text: str) -> list:
    """What math-verify makes of one formula, taken whole.

    It does not look for a number somewhere in what it cannot read.
    """
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${_DOLLAR.sub('', text)}$", [LatexExtractionConfig()], parsing_timeout=None)


def prepare() -> None:
    """Import math-verify and compile its patterns, before anything is timed.

    Quiet its warnings on timeouts that are off on purpose.
    """
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    _judge_found(_parse("It is $1+1$, which is 2."), "2")
