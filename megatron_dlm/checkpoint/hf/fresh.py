"""A HuggingFace checkpoint of random weights: what a job needs to be tried before real weights are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megatron_dlm.checkpoint.hf.exporter import family_for
from megatron_dlm.checkpoint.hf.safetensors_folder import SINGLE, SafetensorsWriter
from megatron_dlm.checkpoint.hf.source import CONFIG
from megatron_dlm.checkpoint.hf.spans import tensors_of
from megatron_dlm.checkpoint.hf.stored import whole_model
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve


def write_fresh(folder: Path, model: ModelConfig, tokenizer: Path, vocab_size: int, seed: int = 0) -> None:
    """Write config.json, fp32 weights (model.safetensors) and the tokenizer's files.

    Args:
        folder: made anew, with its parents.
        model: its sizes, and in init_method_std the spread of its weights; norms are ones. Its family is SDAR's.
        tokenizer: folder of the tokenizer that goes with it.
        vocab_size: of that tokenizer.
        seed: of the weights.
    """
    model = resolve(model, vocab_size)
    family = family_for(model, None, None)
    shutil.copytree(tokenizer, folder)
    config = family.write(model) | {"architectures": [family.architecture], "torch_dtype": "float32"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    shapes = {name: shape for name, (shape, _) in tensors_of(family.table, whole_model(model), model).items()}
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder / SINGLE, [(name, torch.float32, shape) for name, shape in shapes.items()]) as writer:
        for name, shape in shapes.items():
            drawn = torch.randn(shape, generator=generator) * model.init_method_std
            writer.write(name, torch.ones(shape) if len(shape) == 1 else drawn)
