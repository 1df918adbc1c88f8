"""Which of the options does a response choose, and is it the right one?

The answer is the content of the last closed \\boxed{...}; without one, what follows the last "answer is" or "answer:";
without that, the last line. It chooses an option by its letter, alone ("B", "(B)", "B.", "**B**", "option B") or
before its text ("B) 12"), or, where the options are known, by the option's whole text. The ground truth is a letter or
the text of an option.

Invariants (tests/rewards/test_multiple_choice.py): linear in the length of the response; never raises; a response that
names no option is wrong.
"""

from __future__ import annotations

import re

from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.extract import last_boxed, last_line

MATCH, MISMATCH, NO_ANSWER = "match", "mismatch", "no answer"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEARCHED_END = 1000  # characters at the end of a response without a box in which an answer is looked for

_SAID = re.compile(r"\b(?:answer|choice|option)(?: is)?\b[\s:*]*", re.IGNORECASE)
_DRESS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
# A letter that stands for an option, and whether its text may follow: "B", "(B)", "B.", "B) text", "option B"
_ALONE = re.compile(r"(?:(?:the )?(?:answer|choice|option)(?: is)?:?\s+)?\(?\[?([A-Z])\]?\)?[.:]?", re.IGNORECASE)
_BEFORE_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:])\s")
_AFTER_SAYING = re.compile(r"\(?([A-Z])\)?(?![\w'’])")


def judge(response: str, ground_truth: str, metadata: dict) -> Verdict:
    """Verdict on one response.

    Args:
        response: its whole text.
        ground_truth: a letter, or the text of an option.
        metadata: `options` has the texts of the options in the order of their letters, where they are known.
    """
    options = [_plain(option) for option in metadata.get("options", ())]
    chosen = _chosen(response, options)
    if chosen is None:
        return Verdict(0.0, NO_ANSWER)
    right = _option(ground_truth, options) or _plain(ground_truth)
    return Verdict(1.0, MATCH) if chosen == right else Verdict(0.0, MISMATCH)


def _chosen(response: str, options: list[str]) -> str | None:
    """The letter of the option that the response chooses; where no options are known, its text in a plain form if there
    is no letter. None where nothing is chosen."""
    boxed = last_boxed(response)
    if boxed is not None:
        return _option(boxed, options) or (None if options or not boxed else _plain(boxed))
    end = response[-SEARCHED_END:]
    said = [match.end() for match in _SAID.finditer(end)]
    if said:
        answer = end[said[-1] :].lstrip()
        if option := _option((answer.splitlines() or [""])[0], options):
            return option
        letter = _AFTER_SAYING.match(answer)
        if letter and _is_option(letter[1], options):
            return letter[1]
    return _option(last_line(end) or "", options)


def _option(text: str, options: list[str]) -> str | None:
    """The letter of the option that a short text is, or None."""
    plain = _plain(text)
    text = _DRESS.sub(r"\1", text.strip()).replace("$", "").strip(" *_\t\n")
    letter = _ALONE.fullmatch(text)
    if letter and _is_option(letter[1].upper(), options):
        return letter[1].upper()
    if plain in options:  # after the letters: where options are letters themselves, a letter is not their text
        return LETTERS[options.index(plain)]
    letter = _BEFORE_TEXT.match(text)
    if letter and _is_option(letter[1] or letter[2], options):
        return letter[1] or letter[2]
    return None


def _is_option(letter: str, options: list[str]) -> bool:
    return not options or letter in LETTERS[: len(options)]


def _plain(text: str) -> str:
    """A text without what does not tell options apart: case, needless spaces, a full stop, $ and \\text."""
    text = _DRESS.sub(r"\1", str(text)).replace("$", "").strip(" *_\t\n").rstrip(".")
    return " ".join(text.split()).casefold()
