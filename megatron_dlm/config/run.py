"""What every run has: a seed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RunConfig:
    """The run itself."""

    seed: int = 1234
    """Seed from which every random draw of the run follows."""
