"""Which of the options does a response choose, and is it the right one?

The answer is the content of the last closed \\boxed{...}; without one, what follows the last "answer is" or "answer:";
without that, the last line, and at last the last "option B" anywhere. It chooses an option by its letter, alone ("B",
"(B)", "B.", "**B**", "option B") or before its text ("B) 12"), or, where the options are known, by the option's whole
text; "A or B" chooses none. The ground truth is a letter or the text of an option.

Invariants (tests/rewards/test_multiple_choice.py): linear in the length of the response; never raises; a response that
names no option is wrong.
"""

from __future__ import annotations

import re

from megatron_dlm.data.choices import LETTERS, plain, undressed
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.extract import last_boxed, last_line

MATCH, MISMATCH, NO_ANSWER = "match", "mismatch", "no answer"
SEARCHED_END = 1000  # characters at the end of a response without a box in which an answer is looked for

_SAID = re.compile(r"\b(?:answer|choice|option)(?:\s+is\b|\s*\**:)[\s:*]*", re.IGNORECASE)
# A letter that stands for an option, and whether its text may follow: "B", "(B)", "B.", "B) text", "option B"
_ALONE = re.compile(r"(?:(?:the )?(?:answer|choice|option)(?: is)?:?\s+)?\(?\[?([A-Z])\]?\)?[.:]?", re.IGNORECASE)
_BEFORE_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:])\s")
_LETTER = r"\(?([A-Z])\)?(?![\w'’])"
_AFTER_SAYING = re.compile(rf"(?:(?i:option|choice)\s+)?{_LETTER}")
_BARE = re.compile(rf"\b(?i:answer|choice|option)\s+{_LETTER}")
# another letter beside it, so that neither is chosen: "or B", "/B", ", B", "and B"; not "and I think"
_ANOTHER = re.compile(rf"\s*(?:(?:,\s*)?or\b|/)\s*{_LETTER}|\s*(?:,\s*(?:and\b)?|and\b|&)\s*{_LETTER}(?!\s+[a-z])")


def judge(response: str, ground_truth: str, metadata: dict) -> Verdict:
    """Verdict on one response.

    Args:
        response: its whole text.
        ground_truth: a letter, or the text of an option.
        metadata: `options` has the texts of the options in the order of their letters, where they are known.
    """
    options = [plain(option) for option in metadata.get("options", ())]
    chosen = _chosen(response, options)
    if chosen is None:
        return Verdict(0.0, NO_ANSWER)
    right = _option(ground_truth, options) or plain(ground_truth)
    return Verdict(1.0, MATCH) if chosen == right else Verdict(0.0, MISMATCH)


def _chosen(response: str, options: list[str]) -> str | None:
    """The letter of the option that the response chooses; where no options are known, its text in a plain form if there
    is no letter. None where nothing is chosen."""
    boxed = last_boxed(response)
    if boxed is not None:
        return _option(boxed, options) or (None if options or not boxed else plain(boxed))
    end = response[-SEARCHED_END:]
    said = [match.end() for match in _SAID.finditer(end)]
    if said:
        answer = end[said[-1] :].lstrip()
        if option := _option((answer.splitlines() or [""])[0], options):
            return option
        letter = _AFTER_SAYING.match(answer)
        if letter and _is_option(letter[1], options):
            return None if _ANOTHER.match(answer, letter.end()) else letter[1]
    if option := _option(last_line(end) or "", options):
        return option
    named = [letter for letter in _BARE.finditer(end) if _is_option(letter[1], options)]
    return named[-1][1] if named and not _ANOTHER.match(end, named[-1].end()) else None


def _option(text: str, options: list[str]) -> str | None:
    """The letter of the option that a short text is, or None."""
    whole, text = plain(text), undressed(text)
    letter = _ALONE.fullmatch(text)
    if letter and _is_option(letter[1].upper(), options):
        return letter[1].upper()
    if whole in options:  # after the letters: where options are letters themselves, a letter is not their text
        return LETTERS[options.index(whole)]
    letter = _BEFORE_TEXT.match(text)
    if letter and _is_option(letter[1] or letter[2], options):
        return letter[1] or letter[2]
    return None


def _is_option(letter: str, options: list[str]) -> bool:
    return not options or letter in LETTERS[: len(options)]
