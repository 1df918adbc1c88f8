"""SGLang as the trainer's engine: the interface of `rollout.engine.Engine`, with the work done in a child process.

Each replica of the rollout layout has one child, owned by its leader; the other ranks of the replica get the traces
from it. Requests and traces are those of the native engine, with these differences:
  - `num_forwards` counts one more pass for each block, because SGLang commits a block, the last one too, in a pass of
    its own;
  - decoding block and attention block are one, the same for all requests;
  - weights are updated only while nothing runs, so all tokens that one submission adds have one version.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.distributed as dist

from megatron_dlm.config.errors import DataError
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.parallel.exchange import broadcast_object
from megatron_dlm.rollout.request import Request, check
from megatron_dlm.rollout.sglang.process import Child
from megatron_dlm.rollout.sglang.protocol import Message
from megatron_dlm.rollout.sglang.traces import order_for, trace_of
from megatron_dlm.rollout.sglang.wire import Block

_PATIENCE = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine is built for.

    Attributes:
        max_length: longest text, prompt and terminal block included.
        block_size: of all requests.
        bytes_per_token: of the KV cache, all layers and ranks of the replica together.
        slots: requests that run at the same time.
    """

    max_length: int
    block_size: int
    bytes_per_token: int
    slots: int = 256


class SGLangEngine:
    """
    Args:
        start: makes the child; called on the leader only.
        room: what it is for.
        group: the ranks of the replica; None for one rank.

    Attributes:
        weight_version: recorded with each token that is unmasked from now on.
    """

    def __init__(self, start: Callable[[], Child], room: Room, group: dist.ProcessGroup | None = None) -> None:
        self.room = room
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.is_leader = self.group is None or dist.get_rank(self.group) == 0
        self.child: Child | None = None
        problem = None
        if self.is_leader:
            try:
                self.child = start()
            except Exception as error:  # the others must not wait for ever
                problem = error
        self._share_problem(problem)
        self.cache_tokens = int(self._shared(lambda: self.child.about["cache_tokens"]))
        self.weight_version = 0
        self.asleep = False
        self._running: dict[str, tuple[Request, int]] = {}  # name -> request, version of the weights at its submission
        self._submitted = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._running

    @property
    def vacancies(self) -> int:
        """About how many more requests would start at once, if texts get half as long as they may."""
        return min(self.room.slots, 2 * self.cache_tokens // self.room.max_length) - len(self._running)

    @property
    def kv_cache_bytes(self) -> int:
        """Of this replica; 0 while it sleeps."""
        return 0 if self.asleep else self.cache_tokens * self.room.bytes_per_token

    def submit(self, requests: Iterable[Request]) -> None:
        """Hand requests to the child.

        Raises:
            DataError: a request that can never run; none is handed over then.
        """
        requests = list(requests)
        for request in requests:
            check(request, self.room.max_length)
            if request.sampling.block_size != self.room.block_size:
                raise DataError(
                    f"Prompt {request.prompt_key} asks for blocks of {request.sampling.block_size} tokens, and SGLang "
                    f"was started with blocks of {self.room.block_size}, which hold for all prompts. Use these."
                )
        if not requests:
            return
        self.wake()
        orders = []
        for request in requests:
            name = f"r{self._submitted}"
            self._submitted += 1
            self._running[name] = (request, self.weight_version)
            orders.append(order_for(request, name))
        if self.is_leader:
            self.child.tell("generate", requests=orders)

    def step(self) -> list[Trace]:
        """Wait a moment for responses that are in work, so that whoever steps can look at something else meanwhile.

        Returns: the responses that were completed.
        """
        if self.idle:
            return []
        return self._traces(self._shared(lambda: self._finished(_PATIENCE)), aborted=())

    def run(self, requests: Iterable[Request]) -> list[Trace]:
        """Submit and step until all are done; traces in order of completion."""
        self.submit(requests)
        traces: list[Trace] = []
        while not self.idle:
            traces += self.step()
        return traces

    def abort(self, keys: Iterable[tuple[str, int]] | None = None) -> list[Trace]:
        """End responses early.

        Args:
            keys: (prompt_key, sample) of each; None for all.

        Returns: what they had come to, in complete blocks. One that was completed in the meantime is returned as such;
            one that has no block is forgotten, whether or not it was in work, but for what it brought with it.
        """
        wanted = None if keys is None else set(keys)
        names = [
            name
            for name, (request, _) in self._running.items()
            if wanted is None or (request.prompt_key, request.sample) in wanted
        ]
        if not names:
            return []
        if self.is_leader:
            self.child.tell("abort", names=names)
        traces: list[Trace] = []
        while not self._running.keys().isdisjoint(names):
            traces += self._traces(self._shared(self._finished), aborted=names)
        return traces

    def drop_cache(self) -> None:
        """Forget the keys that older weights wrote; with an idle engine."""
        self.command("flush_cache")

    def sleep(self) -> None:
        """Give the memory of the KV cache back; with an idle engine."""
        if not self.asleep:
            if not self.idle:
                raise ValueError("an engine with requests in work cannot sleep")
            self.command("sleep")
            self.asleep = True

    def wake(self) -> None:
        """Take it again. `submit` does so by itself."""
        if self.asleep:
            self.command("wake")
            self.asleep = False

    def command(self, name: str, **content: object) -> Message:
        """Give the child a command and wait until it is done, on all ranks of the replica. The engine must be idle.

        Raises:
            RuntimeError: it failed.
        """
        if not self.idle:
            raise ValueError(f"{name} while requests are in work")
        return self._shared(lambda: self.child.ask(name, **content))

    def close(self) -> None:
        """End the child; at exit it ends by itself."""
        if self.child is not None:
            self.child.close()
            self.child = None

    def _finished(self, patience: float | None = None) -> list[Message]:
        """Answers that have come: at least one, or what came within so many seconds."""
        if patience is not None and not self.child.link.ready(patience):
            return []
        answers = [self.child.hear()]
        while self.child.link.ready():
            answers.append(self.child.hear())
        for answer in answers:
            if "failed" in answer:
                raise RuntimeError(f"SGLang failed: {answer['failed']}\n{self.child.last_lines()}")
        return answers

    def _traces(self, answers: list[Message], aborted: Iterable[str]) -> list[Trace]:
        traces = []
        for answer in answers:
            request, version = self._running.pop(answer["name"])
            blocks, stopped = [Block.from_wire(block) for block in answer["blocks"]], answer["name"] in aborted
            if blocks or request.partial is not None or not stopped:
                traces.append(trace_of(request, blocks, version, stopped))
        return traces

    def _shared(self, action: Callable[[], object]):
        """What the leader's action returns, on all ranks of the replica; its failure likewise."""
        result = problem = None
        if self.is_leader:
            try:
                result = action()
            except Exception as error:  # the others must not wait for ever
                problem = error
        self._share_problem(problem)
        return result if self.group is None else broadcast_object(result, 0, self.group)

    def _share_problem(self, problem: Exception | None) -> None:
        if self.group is None:
            if problem is not None:
                raise problem
            return
        found = broadcast_object(problem, 0, self.group)
        if found is not None:
            raise problem or found


def visible_devices(indices: list[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a child that is to use these devices of this process's own view."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(max(indices) + 1)]
    return ",".join(names[index].strip() for index in indices)
