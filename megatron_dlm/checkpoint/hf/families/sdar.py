"""SDAR and TraDo: the shape of Qwen3 with blocks and a head of its own at every size.

Their config.json may name neither block size nor mask token; 4 and 151669 are what the published models and SGLang's
table use. `rope_theta` must stand at the top level: SDAR's own configuration class and SGLang look nowhere else.

Source: JetAstra/SDAR; Gen-Verse/dLLM-RL; SGLang 0.5 (dllm).
"""

from __future__ import annotations

from typing import Any

from megatron_dlm.checkpoint.hf.families import qwen3
from megatron_dlm.checkpoint.hf.families.config import Family, HFConfig
from megatron_dlm.config.model import ModelConfig

BLOCK_SIZE, MASK_ID = 4, 151669


def read(config: HFConfig) -> dict[str, Any]:
    return qwen3.read(config) | dict(block_size=config.get("block_size", default=BLOCK_SIZE), logit_shift=0)


def read_moe(config: HFConfig) -> dict[str, Any]:
    return read(config) | qwen3.read_experts(config)


def write(model: ModelConfig) -> dict[str, Any]:
    return qwen3.write_shape(model) | dict(model_type="sdar", attention_bias=False, block_size=model.block_size)


def write_moe(model: ModelConfig) -> dict[str, Any]:
    return write(model) | qwen3.write_experts(model) | dict(model_type="sdar_moe")


FAMILIES = (
    Family("sdar", "SDARForCausalLM", qwen3.TABLE, read, write, MASK_ID),
    Family("sdar-moe", "SDARMoeForCausalLM", qwen3.MOE_TABLE, read_moe, write_moe, MASK_ID),
)
