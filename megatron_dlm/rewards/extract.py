"""Find the answer in a response.

Invariants (tests/rewards/test_extract.py): linear in the length of the text, whatever stands in it; never raises.
"""

from __future__ import annotations

import re

# a box opens; an escaped character, which is no brace; a brace
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces close, or None.

    A box that never closes (a truncated response) does not count, and does not hide the ones before it.
    """
    open_braces: list[int | None] = []  # where the content of a box starts; None for a plain brace
    start, end = -1, -1
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None and opened > start:
                start, end = opened, match.start()
        elif token == "{":
            open_braces.append(None)
        elif token[-1] == "{" and len(token) > 2:
            open_braces.append(match.end())
    return text[start:end].strip() if start >= 0 else None


def last_line(text: str) -> str | None:
    """The last line that is not blank, stripped, or None."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def last_number(text: str) -> str | None:
    """The last number in the text (integer, decimal or a/b), thousands separators removed, or None."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None
