"""Options of a multiple-choice question: their letters, and which texts are the same option.

Records (data/tasks.py) and the judge of responses (rewards/multiple_choice.py) go by the same rule: options that the
judge could not tell apart are refused when they are read.
"""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DRESS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")


def undressed(text: str) -> str:
    """A short text without what LaTeX and Markdown put around it: \\text{}, $, * and _."""
    return _DRESS.sub(r"\1", text.strip()).replace("$", "").strip(" *_\t\n")


def plain(text: str) -> str:
    """What tells options apart: the text without its dress, its case, needless spaces and a full stop at its end."""
    return " ".join(undressed(str(text)).rstrip(".").split()).casefold()
