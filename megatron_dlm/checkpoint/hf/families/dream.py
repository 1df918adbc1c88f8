"""Dream and DiffuCoder: the shape of Qwen2.5 (bias on queries, keys and values) with full attention, and the token at
position i read from position i - 1.

Source: Dream-org/Dream-v0-Instruct-7B (configuration_dream.py, modeling_dream.py); arXiv 2508.15487.
"""

from __future__ import annotations

from typing import Any

from megatron_dlm.checkpoint.hf.families import qwen3
from megatron_dlm.checkpoint.hf.families.config import Family, HFConfig
from megatron_dlm.checkpoint.hf.spans import Heads
from megatron_dlm.config.model import ModelConfig

MASK_ID = 151666
TABLE = qwen3.QWEN2_TABLE | {
    "decoder.layers.self_attention.linear_qkv.bias": Heads(
        *("model.layers.{layer}.self_attn." + f"{one}_proj.bias" for one in "qkv")
    )
}


def read(config: HFConfig) -> dict[str, Any]:
    config.refuse(use_mrope=(False,))
    return qwen3.read_shape(config) | dict(
        qk_layernorm=False,
        add_qkv_bias=True,
        full_attention=True,
        logit_shift=1,
        rotary_base=config.rotary_base(10000.0),
    )


def write(model: ModelConfig) -> dict[str, Any]:
    return qwen3.write_shape(model) | dict(model_type="Dream")


FAMILIES = (Family("dream", "DreamModel", TABLE, read, write, MASK_ID),)
