"""What a reward is: verdicts on responses, and the interface that gives them.

A *judge* is a pure function of one item, (response, ground truth, metadata) -> Verdict; it knows nothing of processes
or time limits. A *scorer* judges many items at once, and always returns a verdict for each of them: whatever a response
does to its judge, the others get theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the workers import this module, and must not import what prompts need
    from megatron_dlm.data.prompts import Prompt

TIMEOUT = "timeout"  # the judge did not finish within the limit
CRASH = "crash"  # the judge took its process down, or raised


class Verdict(NamedTuple):
    """The outcome for one response.

    Attributes:
        correct: 1.0 or 0.0.
        reason: one or a few words for logs ('match', 'mismatch', 'no answer', 'timeout', 'crash', ...).
        score: how right, from 0 to 1, for judges that can say (the share of tests that a program passes); None where
            right and wrong are all there is.
        parts: one word per part that was judged by itself, such as a test ('pass', 'fail', 'timeout', ...).
    """

    correct: float
    reason: str
    score: float | None = None
    parts: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The score, or `correct` where there is none."""
        return self.correct if self.score is None else self.score


Judge = Callable[[str, str, dict], Verdict]


class Scorer(Protocol):
    """Judges responses. Use it as a context manager, or call close()."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict per (prompt, text of the response), in the order of the items."""

    def close(self) -> None:
        """End the worker processes."""
