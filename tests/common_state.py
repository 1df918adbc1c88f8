"""What a checkpoint holds beside its tensors, for tests that change it: in both of megatron-core's formats."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from megatron_dlm.platform.megatron import COMMON

COMMON_IS_A_FILE = tuple(int(part) for part in version("megatron-core").split(".")[:2]) < (0, 19)


def change_common_state(folder: Path, change: Callable[[dict], object]) -> None:
    """Write it anew, changed. Where it is not a file, the file hides what is among the tensors."""
    import torch

    from megatron_dlm.platform.megatron import common_state

    common = common_state(folder)
    change(common)
    torch.save(common, folder / COMMON)
