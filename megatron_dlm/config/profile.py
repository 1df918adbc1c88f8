"""What a run writes down about itself for those who want to know where its time and memory go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["rollout", "reward", "old_logprobs", "train", "train_value", "update_weights", "eval"]
"""The phases of a run, in the order of an RL step. Fine-tuning has `train`; `generate` has `rollout`; `evaluate` has
`eval`."""


@dataclass(slots=True)
class ProfileConfig:
    """Traces for a timeline viewer, ranges for Nsight, and what the device's memory held when there was too little."""

    profile: bool = False
    """Write traces of torch's profiler: a file for each phase."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write them."""
    profile_dir: str | None = None
    """Folder for the traces; in training, `profile` in --save when it is not given."""
    profile_passes: int | None = 100
    """Passes of the rollout engine after which the trace of a phase that generates ends, for a long one is more than a
    viewer can show; `null` in a YAML file for all of them."""
    nvtx_ranges: bool = False
    """Mark phases and what they consist of with NVTX ranges, for Nsight Systems. Needs a GPU."""
    memory_snapshot_dir: str | None = None
    """Folder for what is left by a rank that has run out of memory: who held what in which phase, and on a GPU a
    snapshot of the allocator with its recent history."""


@dataclass(slots=True)
class TrainingProfileConfig(ProfileConfig):
    """The same, for some steps of training."""

    profile_step_start: int = 10
    """Steps that are done when tracing begins: 10 traces from the 11th on."""
    profile_step_end: int = 12
    """Steps that are done when tracing ends: 12 traces up to the 12th."""
    profile_phases: list[Phase] | None = None
    """Phases that are traced; all when it is not given."""
