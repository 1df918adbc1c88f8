"""Forward passes of fixed shapes as CUDA graphs: captured once for each shape, replayed afterwards.

A pass of a few hundred tokens is so short on a GPU that launching its kernels takes longer than running them. The
rounds of rounds.py have few shapes, because their width is rounded up to one of `WIDTHS`, and all that changes between
them is the content of five tensors.

Captured addresses must stay what they were: the engine forgets all graphs when its cache sleeps or its weights change.
Not run on CUDA yet. On a CPU a pass is "replayed" by making it again from the same five tensors, which shows that
nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.rollout.attention.queries import Queries

WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_WARM_UP = 3  # passes before a capture, so that kernels are chosen and workspaces exist

_CHANGING = ("pages", "position", "last_visible", "destination")


def width_for(count: int) -> int:
    """The number of places that a round of `count` sequences gets."""
    return next((width for width in WIDTHS if width >= count), count)


class GraphedForward:
    """(tokens [T], queries, slots [N]) -> logits [N, V / TP], which are overwritten by the next call.

    Args:
        forward: the same, eager. It may not wait for the device (Queries.seen is None).
    """

    def __init__(self, forward: Callable[[Tensor, Queries, Tensor], Tensor]) -> None:
        self.forward = forward
        self.captured: dict[tuple[int, ...], _Captured] = {}
        self._pool = None  # of all graphs: only the logits of the last replay are ever read

    def clear(self) -> None:
        """Forget all graphs: what they point to may move."""
        self.captured.clear()

    def __call__(self, tokens: Tensor, queries: Queries, slots: Tensor) -> Tensor:
        shape = (len(queries.count), queries.count[0], len(slots), *queries.pages.shape, queries.key_length[0])
        if shape not in self.captured:
            own = replace(queries, **{name: getattr(queries, name).clone() for name in _CHANGING})
            self.captured[shape] = self._capture(tokens.clone(), own, slots.clone())
        captured = self.captured[shape]
        captured.tokens.copy_(tokens)
        for name in _CHANGING:
            getattr(captured.queries, name).copy_(getattr(queries, name))
        captured.replay()
        return captured.logits

    def _capture(self, tokens: Tensor, queries: Queries, slots: Tensor) -> _Captured:
        again = partial(self.forward, tokens, queries, slots)
        if not platform.is_cuda():
            logits = again()
            return _Captured(tokens, queries, logits, lambda: logits.copy_(again()))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                again()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = again()
        return _Captured(tokens, queries, logits, graph.replay)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A pass on buffers of its own: what it reads, what it leaves, and how it is made again."""

    tokens: Tensor
    queries: Queries
    logits: Tensor
    replay: Callable[[], object]
