"""Whether the engine's weights are those that were trained, found out on a way of its own.

The plan of a refit comes from megatron-core's partition attributes. This check does not know it: it asks both models
where their tensors stand in the stored model (`sharded_state_dict`, the description by which checkpoints are written),
and compares fingerprints. A fingerprint sums, modulo 2^64, the bits of each element times an odd number drawn from the
element's place in the whole tensor. So the fingerprint of a whole is the sum of those of its parts, in whatever way it
is cut; one element that differs, or stands elsewhere, changes it.

Parameters and persistent buffers are compared; counters that no checkpoint holds are not. Of a weight with an adapter
what counts is the two merged. Weights that the engine keeps in FP8 are gone when all has arrived: of these a `Witness`
takes the fingerprints while they are whole, and looks whether what the layer has is that, rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor, nn

from megatron_dlm.config.errors import TrainingError
from megatron_dlm.model.fp8 import FP8, holds
from megatron_dlm.model.lora import OF_ADAPTERS, adapted_layers
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.training.state import TrainState

_ELEMENTS_AT_ONCE = 2**22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a tensor of one layer and expert.

    Attributes:
        key: of that tensor in the stored model.
        offset, shape: of the part in the stored tensor.
        name: in the rank's own model.
        fingerprint: the part's.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    fingerprint: int


class Witness:
    """Sees weights that are about to be dropped.

    Args:
        names: of the weights in FP8, in the rollout model, by their names in the whole model.

    Attributes:
        parts: of the rank's rollout weights that it has seen.
    """

    def __init__(self, rollout_model: nn.Module, names: Mapping[str, str]) -> None:
        self.names, self.parts = names, []
        self._content = _content(rollout_model) if names else {}

    def see(self, name: str, layer: nn.Module, wide: Tensor) -> None:
        """What a layer was given; one that holds something else has the fingerprint of something else."""
        own = self.names[name]
        found = list(_parts_of(own, self._content[own], wide))
        wrong = 0 if holds(layer, wide) else 1
        self.parts += [replace(part, fingerprint=(part.fingerprint + wrong) % 2**64) for part in found]


def check_weights(state: TrainState, rollout_model: nn.Module, seen: Iterable[Part] = ()) -> None:
    """Compare every rank's rollout weights with the training weights. Collective over the world.

    Args:
        seen: parts of the rank's rollout weights that it does not keep as they were.

    Raises:
        TrainingError: they differ; names the first parameter that does.
    """
    trained = list(_parts(state.unwrapped_chunks(), state.groups.pg_collection.dp_cp))
    rolled = [*_parts([rollout_model], rollout_model.pg_collection.dp_cp), *seen]
    answers = gather_objects((trained, rolled))
    name = differing(
        (part for answer in answers for part in answer[0]), (part for answer in answers for part in answer[1])
    )
    if name is not None:
        raise TrainingError(
            f"After the weights were carried to the rollout engine, its {name} is not what was trained. Go on from the "
            "last checkpoint, and give rollouts the layout of training if it happens again."
        )


def differing(trained: Iterable[Part], rolled: Iterable[Part]) -> str | None:
    """The first rollout parameter that is not as trained; None if there is none.

    A part that some training rank has too must be equal to that of one of them. (Those that have the same part may
    differ in the last bits where each computes its own gradient.) Parts that are cut in another way must add up.

    Args:
        trained, rolled: the parts of all ranks.
    """
    known: dict[tuple, set[int]] = {}
    pieces: dict[str, dict[tuple, int]] = {}
    for part in trained:
        known.setdefault((part.key, part.offset, part.shape), set()).add(part.fingerprint)
        pieces.setdefault(part.key, {}).setdefault((part.offset, part.shape), part.fingerprint)
    recut: dict[str, dict[tuple, Part]] = {}
    for part in rolled:
        place = (part.key, part.offset, part.shape)
        if place in known:
            if part.fingerprint not in known[place]:
                return part.name
        elif recut.setdefault(part.key, {}).setdefault(place, part).fingerprint != part.fingerprint:
            return part.name
    for key, parts in recut.items():
        total = sum(part.fingerprint for part in parts.values()) - sum(pieces.get(key, {}).values())
        if total % 2**64:
            return next(iter(parts.values())).name
    return None


def fingerprint(tensor: Tensor, offset: Iterable[int], whole: tuple[int, ...]) -> int:
    """The share of `tensor` in the fingerprint of the tensor that it is a part of.

    Args:
        tensor: the part; it may lack leading dimensions of the whole, in which it then has one element.
        offset: where it begins in the whole.
        whole: shape of that.
    """
    strides = [1] * len(whole)
    for dim in range(len(whole) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * whole[dim + 1]
    start = sum(begin * stride for begin, stride in zip(offset, strides, strict=True))
    tensor = tensor.detach()[None]  # so that there is a dimension to go through, in parts
    strides = [0, *strides[len(whole) - tensor.dim() + 1 :]]
    if tensor.dim() > 1 and tensor[0].numel() > _ELEMENTS_AT_ONCE:
        tensor, strides = tensor[0], strides[1:]
    inner = torch.zeros((1,) * tensor.dim(), dtype=torch.int64, device=tensor.device)
    for dim in range(1, tensor.dim()):
        inner = inner + _along(dim, torch.arange(tensor.shape[dim], device=tensor.device) * strides[dim], tensor.dim())
    rows, total = max(1, _ELEMENTS_AT_ONCE // max(1, tensor[0].numel())), 0
    for first in range(0, tensor.shape[0], rows):
        some = tensor[first : first + rows].contiguous()
        number = torch.arange(first, first + some.shape[0], device=tensor.device)
        place = start + inner + _along(0, number * strides[0], tensor.dim())
        bits = some.view(_BITS[some.element_size()]).to(torch.int64)
        total += int((bits * _odd(place)).sum())
    return total % 2**64


def _along(dim: int, values: Tensor, dims: int) -> Tensor:
    """Values [n] as a tensor of `dims` dimensions that varies along one of them."""
    return values.view([-1 if axis == dim else 1 for axis in range(dims)])


def _odd(place: Tensor) -> Tensor:
    """An odd number for each place, without any pattern (splitmix64's finaliser)."""
    value = place * -7046029254386353131
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return (value ^ _shift(value, 31)) | 1


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right, and fill with zeros (torch fills with the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _parts(chunks: Iterable[nn.Module], replicas: torch.distributed.ProcessGroup) -> Iterator[Part]:
    for chunk in chunks:
        adapted = dict(adapted_layers(chunk))
        for name, value in _content(chunk, replicas).items():
            stored = getattr(value, "data", None)
            if OF_ADAPTERS in name or (isinstance(stored, Tensor) and stored.dtype == FP8):
                continue
            data = adapted[name].lora.merged(adapted[name].weight) if name in adapted else None
            yield from _parts_of(name, value, data)


def _content(
    chunk: nn.Module, replicas: torch.distributed.ProcessGroup | None = None
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Where the tensors of a chunk stand in the stored model."""
    return chunk.sharded_state_dict(metadata={"dp_cp_group": replicas or chunk.pg_collection.dp_cp})


def _parts_of(name: str, value: ShardedTensor | ShardedTensorFactory, data: Tensor | None = None) -> Iterator[Part]:
    """Args: data: what counts, where that is not what is stored."""
    if data is not None:
        own_type = {"dtype": data.dtype} if isinstance(value, ShardedTensor) else {}
        value = replace(value, data=data, **own_type)
    for tensor in nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]:
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            offset, whole = tuple(tensor.global_offset), tuple(tensor.global_shape)
            key = f"{tensor.key}{list(offset[: tensor.prepend_axis_num])}"
            data = dequantize_fp8_tensor(tensor.data) if is_float8tensor(tensor.data) else tensor.data
            yield Part(key, offset, tuple(tensor.data.shape), name, fingerprint(data, offset, whole))
