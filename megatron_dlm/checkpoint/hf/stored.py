"""The tensors of a whole model as a distributed checkpoint keeps them, and how to read them from one.

Layers that are all alike lie in one tensor with a first axis of layers; otherwise each has a key of its own. Experts
lie along a further axis. `Stored` hides that.

Invariant (tests/checkpoint/hf/test_stored.py): `whole_model` names what megatron-core's sharded_state_dict of the model
names, with the same shapes.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from megatron_dlm.checkpoint.hf.spans import Stored
from megatron_dlm.checkpoint.places import reading
from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.config.model import ModelConfig

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def whole_model(model: ModelConfig) -> list[Stored]:
    """All weights and persistent buffers of a resolved model, in the order of its layers."""
    hidden, multiple = model.hidden_size, model.make_vocab_size_divisible_by
    vocabulary = -(-model.vocab_size // multiple) * multiple
    found = [Stored("embedding.word_embeddings.weight", None, None, (vocabulary, hidden))]
    for layer in range(model.num_layers):
        dense = model.num_experts is None or layer < (model.moe_first_k_dense or 0)
        shapes = _attention(model) | (_dense(model) if dense else _routed(model))
        found += [Stored(f"decoder.layers.{key}", layer, None, shape) for key, shape in shapes.items()]
        for expert in range(0 if dense else model.num_experts):
            shapes = _gated("mlp.experts.experts", hidden, model.moe_ffn_hidden_size)
            found += [Stored(f"decoder.layers.{key}", layer, expert, shape) for key, shape in shapes.items()]
    found.append(Stored("decoder.final_layernorm.weight", None, None, (hidden,)))
    if model.untie_embeddings_and_output_weights:
        found.append(Stored("output_layer.weight", None, None, (vocabulary, hidden)))
    return found


def _attention(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = model.hidden_size, model.kv_channels
    rows = (model.num_attention_heads + 2 * model.num_query_groups) * width
    shapes = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (rows, hidden),
        "self_attention.linear_proj.weight": (hidden, model.num_attention_heads * width),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
    }
    if model.add_qkv_bias:
        shapes["self_attention.linear_qkv.bias"] = (rows,)
    if model.qk_layernorm:
        shapes |= {f"self_attention.{one}_layernorm.weight": (width,) for one in "qk"}
    return shapes


def _gated(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.linear_fc1.weight": (2 * width, hidden), f"{name}.linear_fc2.weight": (hidden, width)}


def _dense(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return _gated("mlp", model.hidden_size, model.ffn_hidden_size)


def _routed(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"mlp.router.weight": (model.num_experts, model.hidden_size)}
    if model.moe_router_enable_expert_bias:
        shapes["mlp.router.expert_bias"] = (model.num_experts,)
    if model.moe_shared_expert_intermediate_size is not None:
        shapes |= _gated("mlp.shared_experts", model.hidden_size, model.moe_shared_expert_intermediate_size)
    return shapes


def layers_differ(model: ModelConfig) -> bool:
    """Whether layers have keys of their own in a checkpoint."""
    return bool(model.moe_first_k_dense)


def place_of(shard: ShardedTensor) -> tuple[Stored, tuple[int, ...]]:
    """The tensor that a shard belongs to, and where in it the shard begins."""
    axes = shard.prepend_axis_num
    indices = list(shard.global_offset[:axes])
    own = _LAYER.search(shard.key)
    layer = expert = None
    if own is not None:
        layer = int(own[1])
    elif ".layers." in shard.key:
        layer = indices.pop(0)
    if indices:
        (expert,) = indices
    key = _LAYER.sub(".layers.", shard.key)
    return Stored(key, layer, expert, tuple(shard.global_shape[axes:])), tuple(shard.global_offset[axes:])


def shard_of(stored: Stored, data: Tensor, model: ModelConfig) -> ShardedTensor:
    """A whole tensor, ready for megatron-core's dist_checkpointing."""
    key, axes = stored.key, []
    if stored.layer is not None and layers_differ(model):
        key = key.replace(".layers.", f".layers.{stored.layer}.", 1)
    elif stored.layer is not None:
        axes.append((0, stored.layer, model.num_layers))
    if stored.expert is not None:
        axes.append((len(axes), stored.expert, model.num_experts))
    vocabulary = key in ("embedding.word_embeddings.weight", "output_layer.weight")
    return ShardedTensor.from_rank_offsets(
        key, data, *axes, prepend_axis_num=len(axes), allow_shape_mismatch=vocabulary
    )


class StoredReader:
    """Reads rows of stored tensors from a distributed checkpoint, whatever layout wrote it. Not collective.

    Args:
        folder: iter_0000010/.
        model: resolved; of the checkpoint.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.model = folder, model
        self.reader = FileSystemReader(str(folder))
        with reading(folder):
            self.metadata = self.reader.read_metadata()
            self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def dtype(self, stored: Stored) -> torch.dtype:
        return self._entry(stored)[1].properties.dtype

    def read(self, stored: Stored, start: int, count: int) -> Tensor:
        """Rows [start, start + count)."""
        name, entry, prefix = self._entry(stored)
        out = torch.empty((count, *stored.shape[1:]), dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(
            torch.Size([*prefix, start, *[0] * (len(stored.shape) - 1)]),
            torch.Size([*[1] * len(prefix), count, *stored.shape[1:]]),
        )
        items = _read_items(name, entry, wanted)
        planner = _IntoOne(out.view(wanted.sizes))
        with reading(self.folder):
            self.reader.read_data(LoadPlan(items), planner).wait()
        if planner.filled != out.numel():
            raise CheckpointError(
                f"The checkpoint {self.folder} holds only a part of {name}. Choose another iteration with --ckpt-step."
            )
        return out

    def _entry(self, stored: Stored) -> tuple[str, TensorStorageMetadata, list[int]]:
        """Key, entry, and indices before the tensor's own axes."""
        shard = shard_of(stored, torch.empty(stored.shape, device="meta"), self.model)
        entry = self.metadata.state_dict_metadata.get(shard.key)
        axes = shard.prepend_axis_num
        if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size[axes:]) != stored.shape:
            there = "none" if entry is None else f"one of shape {tuple(entry.size[axes:])}"
            raise CheckpointError(
                f"The checkpoint {self.folder} should hold a weight {shard.key} of shape {stored.shape}, and holds "
                f"{there}. It was written by another model; choose another one."
            )
        return shard.key, entry, list(shard.global_offset[:axes])


def _read_items(name: str, entry: TensorStorageMetadata, wanted: ChunkStorageMetadata) -> list[ReadItem]:
    """What of the stored chunks overlaps with the wanted part."""
    items = []
    for chunk in entry.chunks:
        low = [max(a, b) for a, b in zip(chunk.offsets, wanted.offsets)]
        high = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, wanted.offsets, wanted.sizes)]
        if any(a >= b for a, b in zip(low, high)):
            continue
        items.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(name, wanted.offsets),
                dest_offsets=torch.Size(a - b for a, b in zip(low, wanted.offsets)),
                storage_index=MetadataIndex(name, chunk.offsets),
                storage_offsets=torch.Size(a - b for a, b in zip(low, chunk.offsets)),
                lengths=torch.Size(b - a for a, b in zip(low, high)),
            )
        )
    return items


class _IntoOne(LoadPlanner):
    """Puts all that is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        self.out, self.filled = out, 0

    def set_up_planner(self, *_: object, **__: object) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("items are made by _read_items")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        raise ValueError(f"{read_item.dest_index} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.out
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            target = target.narrow(axis, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.filled += tensor.numel()
