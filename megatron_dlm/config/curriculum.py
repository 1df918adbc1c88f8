"""Which prompts an RL step works on: in which proportions, how hard, and how many until its batch is full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class CurriculumConfig:
    """Which prompts RL takes."""

    prompt_weights: list[float] = field(default_factory=list)
    """Shares of the sources of --prompt-data among the prompts of a run, in the same order: 2 1 takes two prompts of
    the first for each of the second. Each source then goes through epochs of its own. Without weights all prompts are
    one pool, and a source has the share of its size."""
    prompt_sampling: Literal["epoch", "difficulty"] = "epoch"
    """Take each prompt once per epoch, or the more often the nearer the share of right responses to it is to one half;
    a prompt that was not answered yet counts as if half of its responses were right."""
    difficulty_floor: float = 0.1
    """How often a prompt that is always or never solved is taken, beside one that is solved half of the time, whose
    weight is this plus 1; 0 takes such prompts only when there are no others."""
    difficulty_momentum: float = 0.7
    """What a prompt's running share of right responses keeps of its past when the prompt is visited again."""
    pass_rates: str | None = None
    """Folder of an earlier run with --prompt-sampling difficulty, whose running shares a new run begins with; each
    counts as one visit, for the model is another one now. A resumed run has its own."""
    dynamic_sampling: bool = False
    """Take more prompts within an RL step until --rollout-batch-size groups of responses can be learned from: those
    with different rewards, and right responses within --min-group-accuracy and --max-group-accuracy."""
    max_sampling_rounds: int = 8
    """Most rounds of generation that dynamic sampling makes in an RL step; then the step learns from what it has."""
