"""From HuggingFace to a model in its layout, or to a distributed checkpoint.

Each shard reads its own slices from the mapped files, so a rank needs memory for what it keeps, and no rank ever holds
a whole model that it does not keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.checkpoint.hf.families import Family
from megatron_dlm.checkpoint.hf.safetensors_folder import DTYPES, SafetensorsFolder
from megatron_dlm.checkpoint.hf.source import HFSource, main_dtype
from megatron_dlm.checkpoint.hf.spans import Stored, within
from megatron_dlm.checkpoint.hf.stored import place_of, shard_of, whole_model
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.lora import OF_ADAPTERS
from megatron_dlm.training.sleep import wake
from megatron_dlm.training.state import TrainState

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_into(state: TrainState, source: HFSource, model: ModelConfig) -> None:
    """Fill a model with the weights of a HuggingFace checkpoint. Every rank reads what it keeps; not collective.

    Args:
        model: resolved, from `source.fields`; it may have more tokens, whose rows become 0.

    Raises:
        CheckpointError: the weights are damaged or do not fit. ConfigError: the model's are kept in FP8.
    """
    if state.config.fp8_param:  # slices of them are copies
        raise ConfigError(
            "Weights that are kept in FP8 (--fp8-param-gather) cannot be read from a HuggingFace checkpoint. Convert "
            "it with the convert command first."
        )
    model = _as_there(source, model)
    weights = source.check(whole_model(model), model)
    with torch.no_grad():
        for shard in shards_of(state):
            stored, offset = place_of(shard)
            fill(shard.data, stored, offset, source.family, model, weights)
    if state.optimizer is not None:
        wake(state)
        with platform.cuda_calls_on_cpu():
            state.optimizer.reload_model_params()  # the fp32 master copies follow the new weights


def _as_there(source: HFSource, model: ModelConfig) -> ModelConfig:
    """The same model with the vocabulary that the source has rows for."""
    return dataclasses.replace(model, vocab_size=source.fields["vocab_size"])


def shards_of(state: TrainState) -> Iterator[ShardedTensor]:
    """This rank's tensors as parts of the whole model; their data are the parameters themselves. Without adapters."""
    metadata = {"dp_cp_group": state.groups.pg_collection.dp_cp}
    for chunk in state.unwrapped_chunks():
        for value in nested_values(chunk.sharded_state_dict(metadata=metadata)):
            parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
            yield from (part for part in parts if isinstance(part, ShardedTensor) and OF_ADAPTERS not in part.key)


def fill(
    target: Tensor,
    stored: Stored,
    offset: tuple[int, ...],
    family: Family,
    model: ModelConfig,
    weights: SafetensorsFolder,
) -> None:
    """Read one shard: rows from offset[0] and, of matrices, columns from offset[1]. Rows without a source become 0."""
    columns = None
    if target.ndim > 1 and target.shape[1] != stored.shape[1]:
        columns = slice(offset[1], offset[1] + target.shape[1])
    spans = within(family.table[stored.key].spans(stored, model), offset[0], target.shape[0])
    if sum(span.count for span in spans) < target.shape[0]:
        target.zero_()
    for span in spans:
        target[span.start : span.start + span.count].copy_(weights.read(span.name, span.source, span.count, columns))


def describe(source: HFSource, weights: SafetensorsFolder) -> dict[str, Any]:
    """What an export must know to write the same checkpoint again; JSON can hold it."""
    main = main_dtype(weights.tensors)
    odd = {name: _DTYPE_NAMES[info.dtype] for name, info in weights.tensors.items() if info.dtype != main}
    return {"family": source.family.name, "dtype": _DTYPE_NAMES[main], "odd_dtypes": odd}


def content_of(source: HFSource, model: ModelConfig) -> dict[str, ShardedTensor]:
    """This rank's share of the weights, to be written as a distributed checkpoint without building a model.

    The ranks' shares together are the whole model, whatever layout will load it.

    Raises:
        CheckpointError: the weights are damaged or do not fit.
    """
    everything, model = whole_model(model), _as_there(source, model)
    weights = source.check(everything, model)
    content = {}
    for index, stored in enumerate(share_of_rank(everything)):
        data = torch.empty(stored.shape, dtype=_dtype(stored, source, model, weights))
        fill(data, stored, (0,) * data.ndim, source.family, model, weights)
        content[str(index)] = shard_of(stored, data, model)
    return content


def _dtype(stored: Stored, source: HFSource, model: ModelConfig, weights: SafetensorsFolder) -> torch.dtype:
    if stored.key.endswith("expert_bias"):
        return torch.float32  # megatron-core's buffer
    names = {span.name for span in source.family.table[stored.key].spans(stored, model)}
    return reduce(torch.promote_types, (weights.tensors[name].dtype for name in names))


def share_of_rank(everything: list[Stored]) -> Iterable[Stored]:
    """This rank's part of the weights of a model, where all ranks together write them."""
    return _share(everything, dist.get_rank(), dist.get_world_size())


def _share(everything: list[Stored], rank: int, size: int) -> Iterable[Stored]:
    """A rank's part: a run of tensors, about equal in elements."""
    total, before = sum(torch.Size(stored.shape).numel() for stored in everything), 0
    for stored in everything:
        middle = before + torch.Size(stored.shape).numel() / 2
        before += torch.Size(stored.shape).numel()
        if int(middle * size / total) == rank:
            yield stored
