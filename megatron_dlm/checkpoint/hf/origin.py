"""What a model keeps of the HuggingFace checkpoint that it came from, through all training, for its export.

Beside the weights of a checkpoint lies a folder with the files of the source that are no weights; its settings say of
which family and types the source was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.hf.source import HFSource, read_companions

FOLDER = "hf"  # within a checkpoint


@dataclass(frozen=True, slots=True)
class Origin:
    """Attributes: info: `importer.describe` of the source. files: name -> content."""

    info: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of_source(cls, source: HFSource) -> Origin:
        from megatron_dlm.checkpoint.hf.importer import describe
        from megatron_dlm.checkpoint.hf.safetensors_folder import SafetensorsFolder

        return cls(describe(source, SafetensorsFolder(source.folder)), source.companions())

    @classmethod
    def of_checkpoint(cls, folder: Path, extra: dict[str, Any]) -> Origin | None:
        """Args: folder: iter_0000010/. extra: what was stored beside the weights."""
        if extra.get("hf") is None:
            return None
        return cls(extra["hf"], read_companions(folder / FOLDER) if (folder / FOLDER).is_dir() else {})

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        (folder / FOLDER).mkdir()
        for name, content in self.files.items():
            (folder / FOLDER / name).write_bytes(content)
