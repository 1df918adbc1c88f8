"""How responses are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class RewardConfig:
    """How responses are judged."""

    reward: Literal["math", "reasoning_gym"] = "math"
    """Judge: compare mathematical answers, or ask the reasoning_gym task."""
    reward_workers: int = 2
    """Processes that judge responses."""
    reward_timeout: float = 5.0
    """Seconds after which judging one response is given up."""
