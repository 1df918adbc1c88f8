"""What `--fp8-recipe delayed` knows of earlier steps, in checkpoints: the largest numbers of tensors, and the scales
made of them.

Without it a run that goes on would scale its first tensors by 1. Transformer Engine has a form of its own for it, which
is pickled, and which it refuses to read unless told to; here it is plain tensors, stored under the names and places of
that form. So the layout may change, and a checkpoint without it can be read: then histories start anew.

Invariant (tests/parallel/test_te_fp8.py): after loading, every product has the history that it had.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

EXTRA = "._extra_state"  # in the names of Transformer Engine's form; of experts with a number behind it
_WAYS = ("scaling_fwd", "scaling_bwd")
_PARTS = ("scale", "amax_history")  # [tensors], [steps, tensors]


def keeps_history(config: TransformerConfig) -> bool:
    return config.fp8 is not None and config.fp8_recipe == "delayed"


def to_save(chunk: nn.Module, entries: dict[str, Any]) -> dict[str, ShardedObject]:
    """The histories of a chunk's products, for dist_checkpointing.save.

    Args:
        entries: sharded state of the chunk, whose extra states say where each product is in the whole model.
    """
    found = {}
    for name, entry, product, expert in _products(chunk, entries):
        history = {f"{way}.{part}": tensor.to("cpu", copy=True) for way, part, tensor in _history(product, expert)}
        if history:
            found[name] = _with(entry, history)
    return found


def to_load(chunk: nn.Module, entries: dict[str, Any], stored: Container[str]) -> dict[str, ShardedObject]:
    """The same as a template for dist_checkpointing.load.

    Args:
        stored: keys of what a checkpoint has (`stored_in`); products without a history there are left out.
    """
    return {name: _with(entry, None) for name, entry, _, _ in _products(chunk, entries) if entry.unique_key in stored}


def stored_in(folder: Path) -> Container[str]:
    """Keys of all tensors and histories of a checkpoint."""
    return serialization.load_sharded_metadata(str(folder)).keys()


def put(chunk: nn.Module, loaded: dict[str, Any], config: TransformerConfig) -> None:
    """Give products the histories that were read for them; before their weights, which may be kept in FP8, are rounded
    with these scales.
    """
    from megatron.core.fp8_utils import get_fp8_context

    for name, _, product, expert in _products(chunk, loaded):
        with torch.no_grad(), get_fp8_context(config):
            product.init_fp8_metadata(num_gemms=getattr(product, "num_gemms", 1))
        for way, part, tensor in _history(product, expert):
            there = loaded[name][f"{way}.{part}"]
            if part == "amax_history":
                there = _of_length(there, len(tensor))
            tensor.copy_(there)


def _of_length(history: Tensor, steps: int) -> Tensor:
    """Largest numbers [stored steps, tensors] -> [steps, tensors]; the length may be another one today. First comes the
    step under way, then others from the oldest to the newest.
    """
    found = torch.zeros(steps, history.shape[1], dtype=history.dtype)
    found[0] = history[0]
    known = min(steps, len(history)) - 1
    if known:
        found[-known:] = history[-known:]
    return found


def _products(chunk: nn.Module, entries: dict[str, Any]) -> Iterator[tuple[str, Any, nn.Module, int]]:
    """Modules that multiply in FP8: name and value of their entry, the module, and which of its experts."""
    for name, entry in entries.items():
        module, extra, expert = name.partition(EXTRA)
        product = chunk.get_submodule(module) if extra else None
        if hasattr(product, "init_fp8_metadata"):  # norms have extra states, too
            yield name, entry, product, int(expert or 0)


def _history(product: nn.Module, expert: int) -> Iterator[tuple[str, str, Tensor]]:
    """A product's own tensors, or views of one expert's columns; none before its first pass in FP8."""
    experts = getattr(product, "num_gemms", 1)
    one_by_one = hasattr(product, "_num_fp8_tensors_per_gemm")  # older releases have the inputs of all experts first
    for way in _WAYS:
        for part in _PARTS:
            whole = getattr(product.fp8_meta.get(way), part, None)
            if whole is not None:
                size = whole.shape[-1] // experts
                own = slice(expert * size, (expert + 1) * size) if one_by_one else slice(expert, None, experts)
                yield way, part, whole[..., own]


def _with(entry: ShardedObject, data: Any) -> ShardedObject:
    return ShardedObject(entry.key, data, entry.global_shape, entry.global_offset, entry.replica_id)
