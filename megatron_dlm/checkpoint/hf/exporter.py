"""From a distributed checkpoint, whatever layout wrote it, to HuggingFace; and the comparison of the two.

Each rank writes files of its own, tensor by tensor. All is written to a folder beside the target that takes its name at
the end, so an interrupted export leaves nothing that looks complete.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.checkpoint import fit
from megatron_dlm.checkpoint.hf.families import FAMILIES, Family, HFConfig
from megatron_dlm.checkpoint.hf.safetensors_folder import DTYPES, INDEX, SINGLE, SafetensorsFolder, SafetensorsWriter
from megatron_dlm.checkpoint.hf.source import CONFIG, HFSource
from megatron_dlm.checkpoint.hf.spans import Piece, tensors_of
from megatron_dlm.checkpoint.hf.stored import StoredReader, whole_model
from megatron_dlm.config.errors import CheckpointError, ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve

_TYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of an export."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def family_for(model: ModelConfig, named: str | None, origin: str | None) -> Family:
    """The family to export as.

    Args:
        named: by the user. origin: that of the checkpoint which the model came from. Where both are None it is SDAR's,
            whose shape is that of this package's own models, or Qwen3's where logits are ahead of their tokens.

    Raises:
        ConfigError: it is not known, or its checkpoints have no place for a weight of this model.
    """
    usual = ("qwen3" if model.logit_shift else "sdar") + ("" if model.num_experts is None else "-moe")
    name = named or origin or usual
    if name not in FAMILIES:
        raise ConfigError(f"--hf-family {name} is not known. Use one of {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    if named is None and model.block_size != 1 and not model.logit_shift and family.with_blocks is not None:
        family = FAMILIES[family.with_blocks]  # an autoregressive model that has learned blocks
    extra = sorted({stored.key for stored in whole_model(model)} - family.table.keys())
    if extra:
        raise ConfigError(
            f"A {family.name} checkpoint has no place for {extra[0]}, which this model has. Use another --hf-family."
        )
    return family


def check_described(family: Family, model: ModelConfig, config: dict[str, Any]) -> None:
    """Refuse a config.json that would be read back as another model: a family has no words for everything.

    The block may differ: a model is used with the block size of whoever loads it.

    Raises:
        ConfigError: it would.
    """
    try:
        described = resolve(ModelConfig(**family.read(HFConfig(config, CONFIG))), None)
        fit.check_same_model(
            {"model": dataclasses.asdict(described)}, model, f"a {family.name} checkpoint", finetune=True
        )
        if bool(described.full_attention) != bool(model.full_attention):
            raise CheckpointError(f"{family.name} checkpoints and this model differ in --full-attention.")
    except (CheckpointError, TypeError) as error:
        raise ConfigError(
            f"A {family.name} checkpoint cannot describe this model ({str(error).rstrip('.')}). Use another "
            "--hf-family."
        ) from None


def targets(
    family: Family, model: ModelConfig, reader: StoredReader, dtype: torch.dtype | None, odd: dict[str, str]
) -> list[Target]:
    """The tensors of an export, in order.

    Args:
        dtype: of all tensors; that of the checkpoint where it is None.
        odd: names and types of those that are kept in another.
    """
    found = []
    for name, (shape, pieces) in tensors_of(family.table, whole_model(model), model).items():
        own = DTYPES[odd[name]] if name in odd else dtype or reader.dtype(pieces[0].stored)
        found.append(Target(name, own, shape, pieces))
    return found


def read(target: Target, reader: StoredReader) -> Tensor:
    """A whole tensor."""
    out = torch.empty(target.shape, dtype=target.dtype)
    for piece in target.pieces:
        out[piece.source : piece.source + piece.count] = reader.read(piece.stored, piece.start, piece.count)
    return out


def split_into_files(wanted: list[Target], limit: int) -> list[list[Target]]:
    """Runs of tensors of at most `limit` bytes (a larger tensor is a file of its own)."""
    files: list[list[Target]] = [[]]
    used = 0
    for target in wanted:
        if files[-1] and used + target.nbytes > limit:
            files.append([])
            used = 0
        files[-1].append(target)
        used += target.nbytes
    return files


def export(
    reader: StoredReader,
    model: ModelConfig,
    family: Family,
    folder: Path,
    companions: dict[str, bytes],
    config: dict[str, Any],
    dtype: torch.dtype | None,
    odd: dict[str, str],
    limit: int,
    wrote: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Write a HuggingFace checkpoint. Collective; on a file system that all ranks see.

    Args:
        folder: replaced at the end, by one rename.
        companions: further files, by name.
        config: config.json of the checkpoint that the model came from; what the model decides is overwritten.
        limit: bytes of one file.
        wrote: called with the bytes of each tensor written by this rank.

    Returns: bytes of all weights.
    """
    written = config | _described(family, model)
    check_described(family, model, written)
    wanted = targets(family, model, reader, dtype, odd)
    files = split_into_files(wanted, limit)
    partial = folder.with_name(f".{folder.name}.partial")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    names = [SINGLE] if len(files) == 1 else [_file_name(index, len(files)) for index in range(len(files))]
    for name, content in list(zip(names, files))[rank::size]:
        with SafetensorsWriter(partial / name, [(one.name, one.dtype, one.shape) for one in content]) as writer:
            for one in content:
                writer.write(one.name, read(one, reader))
                wrote(one.nbytes)
    dist.barrier()
    total = sum(one.nbytes for one in wanted)
    if rank == 0:
        for name, content in companions.items():
            (partial / name).write_bytes(content)
        kind = _TYPE_NAMES[_most_common(wanted)]
        written |= {"torch_dtype": kind} | ({"dtype": kind} if "dtype" in written else {})  # two spellings of it
        (partial / CONFIG).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if len(files) > 1:
            places = {one.name: name for name, content in zip(names, files) for one in content}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        partial.rename(folder)
    dist.barrier()
    return total


def _described(family: Family, model: ModelConfig) -> dict[str, Any]:
    try:
        return family.write(model) | {"architectures": [family.architecture]}
    except TypeError:  # a number that this model does not have
        raise ConfigError(f"A {family.name} checkpoint cannot describe this model. Use another --hf-family.") from None


def _file_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _most_common(wanted: list[Target]) -> torch.dtype:
    count: dict[torch.dtype, int] = {}
    for one in wanted:
        count[one.dtype] = count.get(one.dtype, 0) + one.nbytes
    return max(count, key=lambda dtype: count[dtype])


@dataclass(frozen=True, slots=True)
class Difference:
    """Two checkpoints compared: number of tensors, how many of them differ, the largest difference and its tensor."""

    tensors: int
    different: int
    largest: float
    name: str


def compare(source: HFSource, reader: StoredReader, model: ModelConfig) -> Difference:
    """Compare all weights of a HuggingFace checkpoint with those of a distributed one. Collective; ranks share it.

    Raises:
        CheckpointError: they are not of one shape.
    """
    weights: SafetensorsFolder = source.check(whole_model(model), model)
    wanted = targets(source.family, model, reader, None, {})
    rank, size = dist.get_rank(), dist.get_world_size()
    different, largest, worst = 0, 0.0, ""
    for one in wanted[rank::size]:
        ours, theirs = read(one, reader), weights.read(one.name, 0, one.shape[0])
        if _bits_equal(ours, theirs.to(ours.dtype)) and _bits_equal(ours.to(theirs.dtype), theirs):
            continue
        different += 1
        gap = float((ours.double() - theirs.double()).abs().max())
        if not worst or gap > largest or gap != gap:
            largest, worst = gap, one.name
    found: list[Any] = [None] * size
    dist.all_gather_object(found, (different, largest, worst))
    _, top, name = max(found, key=lambda part: (part[1] != part[1], part[1]))
    return Difference(len(wanted), sum(part[0] for part in found), top, name)


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
