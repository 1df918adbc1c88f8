"""How responses are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class RewardConfig:
    """How responses are judged."""

    reward: Literal["auto", "math", "reasoning_gym"] = "auto"
    """Judge: each prompt's own (auto: reasoning_gym prompts ask their generator, those of files compare mathematical
    answers); math for all prompts; or reasoning_gym, which refuses prompts of files."""
    reward_workers: int = 2
    """Processes that judge responses."""
    reward_timeout: float = 5.0
    """Seconds after which judging one response is given up."""
