"""What `plan` reckons with beside the settings of the run that it plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class PlanConfig:
    """The plan: the machine, and what the texts are like."""

    plan_world_size: int | None = None
    """Number of processes, one per device; as few as the layout needs when it is not given."""
    plan_hardware: str = "h100"
    """Devices and links: a100-40, a100, h100, h200, b200, or a YAML file with figures of others."""
    plan_json: str | None = None
    """File to which the plan's figures are written too."""
    plan_prompt_length: int | None = None
    """Tokens of a typical prompt; half of the longest when it is not given."""
    plan_response_length: int | None = None
    """Tokens of a typical response; half of the longest when it is not given."""
    plan_tokens_per_step: float = 2.0
    """Tokens that a denoising step unmasks on average; at least as many as --denoising-steps asks for."""
    plan_attention: Literal["auto", "dense", "flash"] = "auto"
    """Attention in training: dense keeps masks and padded copies for the backward pass; flash stands for kernels that
    keep queries, keys, values and the output only. auto is dense with --attention-backend dense, and flash otherwise,
    as training is on GPUs."""
    plan_reserve_gib: float = 4.0
    """Memory of each device, in GiB, that is left to the driver, to the buffers of communication and to gaps between
    tensors."""
