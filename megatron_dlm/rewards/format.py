"""Does the text of a response have the form that was asked for?

The named forms are read in one pass, here in the caller. A regular expression of the user's may take any time (Python's
`re` backtracks), so it runs in the reward workers, under their limit per response; one that does not end in time has
not matched.

Invariants (tests/rewards/test_format.py): one value per text, 1.0 or 0.0, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.extract import last_boxed
from megatron_dlm.rewards.workers import WorkerPool

THINK, END_OF_THINK = "<think>", "</think>"


def is_boxed(text: str) -> bool:
    """Whether an answer stands in a \\boxed{} that closes."""
    return bool(last_boxed(text))


def is_thought(text: str) -> bool:
    """Whether the text is thoughts, one </think>, and then something more.

    <think> may open it, or stand at the end of the prompt; anywhere else it is out of place.
    """
    thoughts, end, rest = text.partition(END_OF_THINK)
    thoughts = thoughts.strip().removeprefix(THINK)
    return bool(end and rest.strip()) and THINK not in thoughts and not any(mark in rest for mark in (THINK, end))


FORMS = {"boxed": is_boxed, "think": is_thought}


def judge(response: str, ground_truth: str, metadata: dict) -> Verdict:
    """Whether the regular expression that stands in the place of the ground truth matches the whole text, without white
    space at its ends. Called in a worker."""
    matches = re.fullmatch(ground_truth, response.strip(), re.DOTALL) is not None
    return Verdict(float(matches), "match" if matches else "mismatch")


class FormatScorer:
    """Values of many texts.

    Args:
        form: a name of FORMS, or a regular expression that compiles.
        workers: processes, for a regular expression. timeout: seconds per text.
    """

    def __init__(self, form: str, workers: int, timeout: float) -> None:
        self._form = form
        self._pool = None if form in FORMS else WorkerPool("megatron_dlm.rewards.format", workers, timeout)

    def score(self, texts: Sequence[str]) -> list[float]:
        """1.0 or 0.0 for each text, in order."""
        if self._pool is None:
            return [float(FORMS[self._form](text)) for text in texts]
        return [verdict.correct for verdict in self._pool.judge([(text, self._form, {}) for text in texts])]

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()
