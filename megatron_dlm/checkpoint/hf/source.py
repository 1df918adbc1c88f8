"""A HuggingFace checkpoint to start from: its family, the model that it holds, and the files that go with it.

Everything that can be wrong with it is found when it is opened (configuration) and checked against the model (names and
shapes of all tensors), before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.checkpoint.hf.families import BY_ARCHITECTURE, Family, HFConfig
from megatron_dlm.checkpoint.hf.safetensors_folder import Info, SafetensorsFolder
from megatron_dlm.checkpoint.hf.spans import Stored, tensors_of
from megatron_dlm.config.errors import CheckpointError
from megatron_dlm.config.model import ModelConfig

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_LARGEST_FILE = 64 << 20


@dataclass(frozen=True, slots=True)
class HFSource:
    """Attributes: folder. family. config: its config.json. fields: of ModelConfig, as far as the checkpoint says."""

    folder: Path
    family: Family
    config: dict[str, Any]
    fields: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path, flag: str = "--hf-checkpoint") -> HFSource:
        """Read the configuration.

        Args:
            flag: that named the folder.

        Raises:
            CheckpointError: no such folder, no readable config.json, an unknown architecture, or a model that our
                layers cannot be.
        """
        folder = Path(folder)
        config = read_config(folder, flag)
        family = family_of(config, folder / CONFIG)
        try:
            fields = family.read(HFConfig(config, str(folder / CONFIG)))
        except (TypeError, ValueError, ZeroDivisionError, AttributeError, KeyError) as error:
            raise CheckpointError(
                f"{folder / CONFIG} has a value of the wrong kind ({error}). Correct it, or download it again."
            ) from None
        return cls(folder, family, config, fields)

    @property
    def mask_id(self) -> int | None:
        """Id of the mask token, where the checkpoint or its family names one that its vocabulary has."""
        named, usual = self.config.get("mask_token_id"), self.family.mask_id
        if named is None and usual is not None and usual < self.fields["vocab_size"]:
            return usual
        return named

    def check(self, stored: Sequence[Stored], model: ModelConfig) -> SafetensorsFolder:
        """Open the weights, and compare names and shapes of all tensors with those that the model needs.

        Raises:
            CheckpointError: a file is missing or damaged; a tensor is missing, left over, or of another shape.
        """
        weights = SafetensorsFolder(self.folder)
        extra = sorted({one.key for one in stored} - self.family.table.keys())
        if extra:
            raise CheckpointError(
                f"The model has a weight {extra[0]}, which no {self.family.name} checkpoint holds, such as "
                f"{self.folder}. Leave out the setting that adds it."
            )
        wanted = tensors_of(self.family.table, list(stored), model)
        for name, (shape, _) in wanted.items():
            if name not in weights.tensors:
                raise CheckpointError(
                    f"{self.folder} has no tensor {name}, which its {CONFIG} calls for. Download all of its files."
                )
            there = weights.tensors[name].shape
            if there != shape:
                raise CheckpointError(
                    f"The tensor {name} in {self.folder} has shape {there}, and its {CONFIG} makes it {shape}. "
                    f"Correct {CONFIG}, or give another checkpoint."
                )
        left = sorted(name for name in weights.tensors.keys() - wanted.keys() if not self._is_ignored(name, model))
        if left:
            raise CheckpointError(
                f"{self.folder} has {len(left)} tensors that this model has no place for, {left[0]} among them. "
                f"Its {CONFIG} does not describe it; correct it, or give another checkpoint."
            )
        return weights

    def _is_ignored(self, name: str, model: ModelConfig) -> bool:
        head = [span.name for span in self.family.table["output_layer.weight"].spans(_NOTHING, model)]
        tied = not model.untie_embeddings_and_output_weights
        return name.endswith(self.family.ignored) or (tied and name in head)

    def companions(self) -> dict[str, bytes]:
        """The files beside the weights (configuration, tokenizer, code, generation settings), by name."""
        return read_companions(self.folder)


_NOTHING = Stored("", None, None, (0,))


def read_companions(folder: Path) -> dict[str, bytes]:
    """All smaller files of a folder that are no weights."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {
        path.name: path.read_bytes()
        for path in files
        if not path.name.endswith(_WEIGHTS) and path.stat().st_size <= _LARGEST_FILE
    }


def read_config(folder: Path, flag: str = "--hf-checkpoint") -> dict[str, Any]:
    """Raises CheckpointError where there is no config.json that can be read. `flag`: that named the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}. Give {flag} the folder of a HuggingFace checkpoint.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise CheckpointError(
            f"{folder / CONFIG} cannot be read ({error.strerror}). Give {flag} the folder of a HuggingFace checkpoint."
        ) from None
    except ValueError:
        raise CheckpointError(f"{folder / CONFIG} is not JSON. Download it again.") from None
    return config


def family_of(config: dict[str, Any], where: Path) -> Family:
    named = config.get("architectures") or ["none"]
    named = [str(one) for one in (named if isinstance(named, list) else [named])]
    for architecture in named:
        if architecture in BY_ARCHITECTURE:
            return BY_ARCHITECTURE[architecture]
    raise CheckpointError(
        f"{where} names the architecture {named[0]}, which is not known. Use one of {', '.join(BY_ARCHITECTURE)}."
    )


def main_dtype(infos: dict[str, Info]) -> torch.dtype:
    """The type that most bytes of a checkpoint are of."""
    count: dict[torch.dtype, int] = {}
    for info in infos.values():
        count[info.dtype] = count.get(info.dtype, 0) + torch.Size(info.shape).numel() * info.dtype.itemsize
    return max(count, key=lambda dtype: count[dtype])
