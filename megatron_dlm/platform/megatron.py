"""What the releases of megatron-core from 0.16.1 on do differently, behind one name each.

Python 3.11 gets 0.16.1, Python 3.12 and newer get the latest: both are in use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMON = "common.pt"  # of a checkpoint that an older release wrote


def submodules_of(part: Callable[..., Any]) -> Any:
    """The submodules that a part of a layer's spec is built with, to be changed in place. The part is a `ModuleSpec`,
    or, in newer releases, a function with its arguments."""
    return part.keywords["submodules"] if isinstance(part, functools.partial) else part.submodules


def common_state(folder: Path) -> dict[str, Any]:
    """What a distributed checkpoint holds beside its tensors: in a file of its own, or, where a newer release wrote it,
    among them. The newer releases read both.

    Raises:
        FileNotFoundError: there is no such file, and this release needs one.
    """
    from megatron.core import __version__, dist_checkpointing

    try:
        return dist_checkpointing.load_common_state_dict(str(folder))
    except AttributeError as error:  # of 0.16, which stumbles over its own words on the missing file
        if (folder / COMMON).exists():
            raise
        raise FileNotFoundError(
            f"no {COMMON}, without which megatron-core {__version__} cannot read it; newer releases write none"
        ) from error
