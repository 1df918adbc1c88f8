"""Low-rank adapters: which layers get them, and how large."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Target = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
OF_MLP = ("linear_fc1", "linear_fc2")


@dataclass(slots=True)
class LoraConfig:
    """Low-rank adapters (LoRA): the model's own weights stay as they are, and small matrices beside them learn."""

    lora_rank: int | None = None
    """Width of the adapters; everything learns when it is not given. They begin as nothing: the model computes what it
    did. They are merged into the weights for rollouts, by what only reads a model, and in what convert writes."""
    lora_alpha: float = 32.0
    """What an adapter adds is multiplied by this over --lora-rank."""
    lora_target_modules: list[Target] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    """Layers that get an adapter, by megatron-core's names: attention's input (queries, keys and values) and output,
    and the MLP's input and output. Those of experts cannot have one: use linear_qkv and linear_proj there."""

    @property
    def wanted(self) -> bool:
        return self.lora_rank is not None

    @property
    def scale(self) -> float:
        """What is in front of B A."""
        return self.lora_alpha / self.lora_rank

    def stored(self) -> dict[str, Any]:
        """As a checkpoint tells it; JSON can hold it, and equal settings are equal."""
        return {"rank": self.lora_rank, "alpha": self.lora_alpha, "targets": sorted(self.lora_target_modules)}

    @classmethod
    def of(cls, stored: dict[str, Any]) -> LoraConfig:
        """From what `stored` returned."""
        return cls(stored["rank"], stored["alpha"], list(stored["targets"]))
