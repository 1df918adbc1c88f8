"""Folders of safetensors files: read slices of tensors, write tensors one after the other.

The safetensors package reads; it writes only what is in memory all at once, so the writer here puts down the (simple)
format itself: length of the header in 8 bytes, header in JSON, tensors end to end.

Nothing is ever unpickled: a folder that holds only pickled weights is refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_dlm.config.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class Info:
    """Where a tensor is, and what it is like."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsFolder:
    """The tensors of a folder with model.safetensors, or with several files and their index.

    Attributes:
        tensors: name -> Info. Files are checked to be whole when the folder is opened.

    Raises:
        CheckpointError: a file is missing, cut short or no safetensors file; or the weights are pickled.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, Info] = {}
        self._open: dict[Path, object] = {}
        for file, names in _files(self.folder):
            found = _header(file)
            missing = sorted(names - found.keys())
            if missing:
                raise CheckpointError(
                    f"{file} lacks the tensor {missing[0]}, which {INDEX} says it holds. Download the checkpoint again."
                )
            self.tensors |= found

    def read(self, name: str, start: int, count: int, columns: slice | None = None) -> Tensor:
        """Rows [start, start + count) of a tensor, and of those some columns; a view of the mapped file."""
        info = self.tensors[name]
        if info.file not in self._open:
            self._open[info.file] = safe_open(str(info.file), framework="pt")
        rows = self._open[info.file].get_slice(name)
        return rows[start : start + count] if columns is None else rows[start : start + count, columns]


def _files(folder: Path) -> list[tuple[Path, set[str]]]:
    """The files, and the tensors that the index expects in each."""
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in places.items():
                files.setdefault(file, set()).add(name)
            return [(folder / file, names) for file, names in sorted(files.items())]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{folder / INDEX} is not the index of a checkpoint. Download the checkpoint again."
            ) from None
    if (folder / SINGLE).is_file():
        return [(folder / SINGLE, set())]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds its weights as pickled files, which can run code when they are read, and they are not. "
            "Give a checkpoint with safetensors files."
        )
    raise CheckpointError(f"{folder} holds no {SINGLE} and no {INDEX}. Give the folder of a HuggingFace checkpoint.")


def _header(file: Path) -> dict[str, Info]:
    """What a file holds; checks its length."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _LONGEST_HEADER):
                raise ValueError("the header is longer than the file")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        infos = {}
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"The tensor {name} in {file} is of type {entry['dtype']}. Only {', '.join(DTYPES)} are read; give "
                    "a checkpoint that is not quantized."
                )
            infos[name] = Info(file, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            begin, stop = entry["data_offsets"]
            if stop - begin != torch.Size(infos[name].shape).numel() * infos[name].dtype.itemsize:
                raise ValueError(f"{name} has other bytes than its shape asks for")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing. Download the checkpoint again, all files of it.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        raise CheckpointError(f"{file} is not a whole safetensors file. Download it again.") from None
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file} has {size} bytes, and its header speaks of {8 + length + end}: it is cut short or damaged. "
            "Download it again."
        )
    return infos


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the order announced. Use it as a context manager.

    Args:
        file: made anew.
        tensors: (name, dtype, shape) of all tensors.
    """

    def __init__(self, file: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors:
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        self._left = list(tensors)[::-1]
        self._stream = open(file, "wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._stream.close()
        if kind is None and self._left:
            raise ValueError(f"the tensor {self._left[-1][0]} was announced and not written")

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor. Raises ValueError if it is not the one announced."""
        announced = self._left.pop()
        if announced != (name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"announced {announced}, written {(name, tensor.dtype, tuple(tensor.shape))}")
        self._stream.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
