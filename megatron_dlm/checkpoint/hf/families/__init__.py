"""The families of HuggingFace checkpoints. One module each; a new one is added to the list below and nowhere else."""

from __future__ import annotations

from megatron_dlm.checkpoint.hf.families import dream, llada, llada2, qwen3, sdar
from megatron_dlm.checkpoint.hf.families.config import Family, HFConfig

FAMILIES: dict[str, Family] = {
    family.name: family for module in (sdar, qwen3, llada, dream, llada2) for family in module.FAMILIES
}
BY_ARCHITECTURE: dict[str, Family] = {family.architecture: family for family in FAMILIES.values()}

__all__ = ["BY_ARCHITECTURE", "FAMILIES", "Family", "HFConfig"]
