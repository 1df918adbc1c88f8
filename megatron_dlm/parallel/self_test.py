"""Whether kernels that this machine compiles are to be relied on: they are tried out before the first pass.

A package that is there and new enough may still not compile here, or compute something else. So a small pass is made
by the kernels and by torch's operations on the same device, once per process, and all ranks hear whether it went well
everywhere: they choose alike. On a CPU nothing is compiled, and nothing is tried out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_dlm import platform
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.parallel.meeting import speaks

_ALLOWED = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-10}

Pairs = Iterable[tuple[str, Tensor, Tensor]]
"""What is compared, as kernels and as torch computed it."""

_found: dict[Hashable, str | None] = {}
_told: set[str] = set()


def needed() -> bool:
    """Whether kernels are compiled in this process."""
    return platform.is_cuda()


def passed(flag: str, choice: str, plain: str, dtype: torch.dtype, work: Callable[[], Pairs], *key: Hashable) -> bool:
    """Whether kernels may be used. Collective over the job, whose ranks get the same answer; the first of them says why
    not, once.

    Args:
        flag: that asks. choice: its value; 'auto' may be answered with no. plain: the value that does without them.
        dtype: which says what rounding explains. work: the small pass.
        key: what else, beside flag and dtype, another pass would have to be made for.

    Raises:
        DependencyError: they were asked for by name, and do not work on some rank.
    """
    name = (flag, dtype, *key)
    if name not in _found:
        _found[name] = _failure(work, _ALLOWED[dtype])
    reasons = gather_objects(_found[name]) if dist.is_initialized() else [_found[name]]
    reason = next((one for one in reasons if one is not None), None)
    if reason is None:
        return True
    if choice != "auto":
        raise DependencyError(f"{flag} {choice} does not work here: {reason}. Use {flag} {plain}.")
    told = f"{flag} auto is {plain} here, because its kernels do not work: {reason}."
    if told not in _told and speaks():
        tqdm.write(told, file=sys.stdout)
    _told.add(told)
    return False


def _failure(work: Callable[[], Pairs], allowed: float) -> str | None:
    """What went wrong; None if nothing did."""
    try:
        with torch.enable_grad():
            for what, mine, right in work():
                difference = relative_difference(mine, right)
                if not difference <= allowed:
                    return f"on a small pass {what} differs by {difference:.1e} from torch's ({allowed:.0e} is allowed)"
    except Exception as error:  # of a compiler or a driver: whatever it says, they cannot be used
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "it says nothing")
        return f"a small pass ended with {type(error).__name__}, {said[:200].rstrip('.')}"
    return None


def relative_difference(mine: Tensor, right: Tensor) -> float:
    """In norm; infinite where a number is none."""
    mine, right = mine.detach().double(), right.detach().double()
    found = float((mine - right.to(mine.device)).norm() / right.norm().clamp(min=1e-30))
    return found if found == found else float("inf")
