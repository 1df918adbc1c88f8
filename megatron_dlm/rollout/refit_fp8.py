"""Where the pieces of an engine's weights go in a refit: into its storage, or, of weights that it keeps in FP8, into a
tensor in the type of training, which is rounded and dropped as soon as it is whole.

The scale of a row needs the whole row, and what comes from other ranks comes in pieces. A refit carries the pieces of a
tensor one after the other (`in_turn`), so that beside a bucket few such tensors are there at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from megatron.core.resharding.utils import ReshardPlan
from torch import Tensor, nn

from megatron_dlm.model.fp8 import load
from megatron_dlm.rollout.reshard_plan import Copy

Step = tuple[Sequence[Copy], ReshardPlan | None]


def in_turn(copies: Sequence[Copy], batches: Sequence[ReshardPlan]) -> list[Step]:
    """The work of a rank in a refit: in each step copies within the rank, then a batch from and to others.

    A tensor of which a part comes from another rank has its own part copied before the batch in which that begins.
    """
    first: dict[str, int] = {}
    for number, batch in enumerate(batches, 1):
        for operation in batch.recv_ops:
            first.setdefault(operation.param_name, number)
    own: list[list[Copy]] = [[] for _ in range(len(batches) + 1)]
    for copy in copies:
        own[first.get(copy.name, 0)].append(copy)
    return list(zip(own, [None, *batches], strict=True))


def pieces(steps: Iterable[Step]) -> Counter[str]:
    """How many pieces of each tensor arrive in these steps."""
    found: Counter[str] = Counter()
    for copies, batch in steps:
        found.update(copy.name for copy in copies)
        found.update(operation.param_name for operation in (batch.recv_ops if batch else ()))
    return found


class Arrivals(Mapping[str, Tensor]):
    """By name what a piece of a tensor is to be written into. Say of each piece that it has `landed`.

    Args:
        stored: the engine's tensors. rounded: the layers of those that it keeps in FP8.
        pieces: that arrive of each.
        seen: called with name, layer and whole weight, when the layer has been given it.
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor],
        rounded: Mapping[str, nn.Module],
        pieces: Counter[str],
        seen: Callable[[str, nn.Module, Tensor], None] | None = None,
    ) -> None:
        self.stored, self.rounded, self.seen = stored, rounded, seen
        self._left = Counter(pieces)
        self._wide: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.rounded:
            return self.stored[name]
        if name not in self._wide:
            layer = self.rounded[name]
            self._wide[name] = torch.empty_like(layer.weight, dtype=layer.wide_dtype)
        return self._wide[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def landed(self, names: Iterable[str]) -> None:
        """A piece of each of these has been written."""
        for name in names:
            if name in self.rounded:
                self._left[name] -= 1
                if not self._left[name]:
                    layer, wide = self.rounded[name], self._wide.pop(name)
                    load(layer, wide)
                    if self.seen is not None:
                        self.seen(name, layer, wide)
