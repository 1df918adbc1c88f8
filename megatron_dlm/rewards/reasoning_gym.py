"""Generated tasks are judged by their own generator.

The answer is the content of the last \\boxed{...}; without a box, the last line, then the last number in it. A score of
1.0 from the generator's score_answer counts as correct; its partial scores do not.
"""

from __future__ import annotations

import json
from functools import lru_cache

from megatron_dlm.data import reasoning_gym
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rewards.extract import last_boxed, last_line, last_number


def judge(response: str, ground_truth: str, metadata: dict) -> Verdict:
    """Verdict on one response.

    `metadata` is that of data/reasoning_gym.py. The ground truth is inside the entry, and not used.
    """
    generator = _generator(metadata["dataset"], json.dumps(metadata["options"], sort_keys=True))
    candidates = _candidates(response)
    if not candidates:
        return Verdict(0.0, "no answer")
    best = max(float(generator.score_answer(answer=answer, entry=metadata["entry"])) for answer in candidates)
    return Verdict(1.0, "match") if best >= 1.0 else Verdict(0.0, "mismatch")


def prepare() -> None:
    """Import the package before anything is timed."""
    import reasoning_gym as package

    assert package.create_dataset  # the import is what takes the time


def _candidates(response: str) -> list[str]:
    boxed = last_boxed(response)
    if boxed is not None:
        return [boxed] if boxed else []
    line = last_line(response)
    if line is None:
        return []
    number = last_number(line)
    return [line] if number in (None, line) else [line, number]


@lru_cache(maxsize=64)
def _generator(name: str, options: str):
    return reasoning_gym.create(name, json.loads(options))
