"""Whether the processes of a job have the same of what megatron-core takes wherever it finds it.

Transformer Engine decides, also under plain layers, which optimizer, which kernels and which checkpoint format a rank
uses. A host that works without it, or with another release of it, would train something else than the others, or leave
them waiting in an operation that it does not make. So the processes compare once, when they have met. One that does not
load is as good as none: it is hidden (platform/te.py).
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from megatron_dlm.config.errors import DependencyError
from megatron_dlm.parallel.exchange import gather_objects
from megatron_dlm.parallel.meeting import speaks
from megatron_dlm.platform import te

_compared = False


def compare_processes() -> None:
    """Compare what all processes found at their start. Collective over the job; the first call counts.

    Raises:
        DependencyError: they differ; the same on all, and told once.
    """
    global _compared
    if _compared or dist.get_world_size() == 1:
        return
    _compared = True
    error = differing(gather_objects((socket.gethostname(), *te.found())))
    if error is not None:
        error.told = not speaks()
        raise error


def differing(found: Sequence[tuple[str, str | None, str]]) -> DependencyError | None:
    """What is wrong with what the processes have; None if nothing is.

    Args:
        found: of each rank its host, the release of Transformer Engine that it works with, and what it has, in words.
    """
    counts = Counter(version for _, version, _ in found)
    if len(counts) < 2:
        return None
    usual = counts.most_common(1)[0][0]
    rank = next(rank for rank, (_, version, _) in enumerate(found) if version != usual)
    other = next(rank for rank, (_, version, _) in enumerate(found) if version == usual)
    (host, _, said), (second, _, words) = found[rank], found[other]
    first = f"process {rank} on {host}" if host == second else f"the host {host} (process {rank})"
    second = f"process {other}" if host == second else second
    error = DependencyError(
        f"All processes of a job need the same Transformer Engine, and {first} has {said}, while {second} has {words}. "
        "Install one release on all hosts, or remove it from all of them."
    )
    error.rank = rank
    return error
