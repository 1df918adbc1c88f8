"""Rounds, or their forward passes, as CUDA graphs: captured once for each shape, replayed afterwards.

A pass of a few hundred tokens is so short on a GPU that launching its kernels takes longer than running them. The
rounds of rounds.py have few shapes, because their width is rounded up to one of `WIDTHS`, and all that changes between
them is the content of a few tensors. With the sampler's kernels, which never wait for the host, the whole round is one
graph: forward pass, head, draw, unmasking, and where each sequence stands then (`GraphedRounds`). With torch's sampler,
whose operations depend on who asks for what, the forward pass is (`GraphedForward`).

Captured addresses must stay what they were: the engine forgets all graphs when its cache sleeps, and when a refit has
left a weight or the cache somewhere else. Weights that were written in place are read by the graphs there are.
Not run on CUDA yet. On a CPU a graph is "replayed" by doing the same again on the same tensors, which shows that
rounds can go on in those of others; what a graph would keep of the host is seen on a pretended GPU
(tests/commands/test_on_a_pretended_gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.rounds import Decide, Forward, Rounds

WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_WARM_UP = 3  # passes before a capture, so that kernels are chosen and workspaces exist

_CHANGING = ("pages", "position", "last_visible", "destination")


def width_for(count: int) -> int:
    """The number of places that a round of `count` sequences gets."""
    return next((width for width in WIDTHS if width >= count), count)


class _Graphs:
    """What was captured, by shape."""

    def __init__(self) -> None:
        self.captured: dict[tuple[int, ...], Any] = {}
        self._recorder = _Recorder()
        self._addresses: tuple[int, ...] = ()

    def clear(self) -> None:
        """Forget all graphs: what they point to may move."""
        self.captured.clear()
        self._recorder = _Recorder()

    def keep_at(self, tensors: Iterable[Tensor]) -> None:
        """Forget all graphs if these tensors, which they read and write, are not where they were when this was last
        asked.
        """
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self._addresses:
            self.clear()
        self._addresses = addresses


class GraphedForward(_Graphs):
    """(tokens [T], queries, slots [N]) -> logits [N, V / TP], which are overwritten by the next call.

    Args:
        forward: the same, eager. It may not wait for the device (Queries.seen is None).
    """

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.forward = forward

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
        logits, replay = self._recorder(again)
        return _Captured(tokens, queries, logits, replay)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A pass on buffers of its own: what it reads, what it leaves, and how it is made again."""

    tokens: Tensor
    queries: Queries
    logits: Tensor
    replay: Callable[[], object]


class GraphedRounds(_Graphs):
    """Whole rounds, each one replay. The rounds that a graph was captured for lend it their tensors; later ones of its
    shape go on in these:

        rounds, again = graphed(rounds)
        for _ in range(4):
            again()
        rounds.outcome()

    Args:
        forward, decide: of `Rounds.round`. They may not wait for the device, and what they read beside their arguments
            may change in content alone, unless the caller tells of it.
    """

    def __init__(self, forward: Forward, decide: Decide) -> None:
        super().__init__()
        self.forward, self.decide = forward, decide

    def __call__(self, rounds: Rounds, *also: int) -> tuple[Rounds, Callable[[], object]]:
        """The rounds to look at, and what makes one of them.

        Args:
            also: beside the rounds' own shape, what a graph cannot be replayed for another value of.
        """
        shape = (*rounds.shape, *also)
        if shape not in self.captured:
            self.captured[shape] = rounds, self._capture(rounds)
        own, replay = self.captured[shape]
        own.take(rounds)
        return own, replay

    def _capture(self, rounds: Rounds) -> Callable[[], object]:
        """Warm-up passes must leave no trace: the sequences idle in them."""
        again = partial(rounds.round, self.forward, self.decide)
        standing = rounds.progress.clone()
        rounds.idle()
        if platform.is_cuda():
            _, replay = self._recorder(again)
        else:
            again()
            replay = again
        rounds.progress.copy_(standing)
        return replay


def graphs_for(options: EngineOptions, forward: Forward, decide: Decide) -> GraphedForward | GraphedRounds | None:
    """What an engine of these options captures; None if nothing."""
    if not options.cuda_graphs:
        return None
    return GraphedRounds(forward, decide) if options.fused_sampler else GraphedForward(forward)


class _Recorder:
    """Captures what some work does as CUDA graphs, which share their memory: what one makes is read before another is
    replayed.
    """

    def __init__(self) -> None:
        self._pool = None

    def __call__(self, work: Callable[[], Tensor | None]) -> tuple[Tensor | None, Callable[[], object]]:
        """Do it some times, then capture it: what it returns, which a replay overwrites, and the replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            made = work()
        return made, graph.replay
