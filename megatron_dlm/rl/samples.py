"""Rollouts as JSON lines: a few of each step to read, all of them to debug."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.data.jsonl import write_jsonl
from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rewards.base import Verdict
from megatron_dlm.rl.exchange import Graded
from megatron_dlm.rollout.samples import sample_record


@dataclass(frozen=True, slots=True)
class Judged:
    """A response that this rank judged."""

    prompt: Prompt
    trace: Trace
    text: str
    verdict: Verdict

    def record(self, **earned: float | None) -> dict[str, Any]:
        return sample_record(self.prompt, self.trace, self.text, self.verdict, **earned)


def readable(
    step: int,
    judged: Sequence[Judged],
    graded: Sequence[Graded],
    advantages: Mapping[tuple[str, int], float],
    count: int,
) -> list[dict[str, Any]]:
    """The first responses to the step's first prompts, then the second ones: a fair sample, for the prompts come
    shuffled.

    Args:
        judged: in the order of their prompts.
        graded: records of at least these responses.
        advantages: of those that are learned from; null stands in the record of any other.
        count: how many at most.
    """
    rewards = {(record.group, record.sample): record.reward for record in graded}
    records = []
    for one in sorted(judged, key=lambda one: one.trace.sample)[:count]:
        key = (one.trace.prompt_key, one.trace.sample)
        records.append({"step": step, **one.record(reward=rewards[key], advantage=advantages.get(key))})
    return records


def dump(folder: str, step: int, rank: int, judged: Sequence[Judged], sampling_round: int = 1) -> None:
    """--save-debug-rollout-data: all responses that this rank judged, in a file of the step and the rank, and of the
    round of dynamic sampling from the second on."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    further = f"_round_{sampling_round:02d}" if sampling_round > 1 else ""
    write_jsonl(
        Path(folder) / f"step_{step:06d}_rank_{rank:04d}{further}.jsonl",
        [one.record() | {"token_ids": one.trace.response_ids.tolist()} for one in judged],
    )
