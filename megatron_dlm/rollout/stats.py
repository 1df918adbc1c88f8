"""What an engine has done so far, in counts and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_dlm.training import profile


@dataclass(slots=True)
class EngineStats:
    """Sums since the engine was built, or since `reset`.

    Attributes:
        passes: of the model.
        denoise_tokens: query tokens in blocks being denoised. commit_tokens: in finished blocks of responses, whose
            final keys were stored. prefill_tokens: all others: prompts, and what preempted sequences computed again.
        shared_tokens: prompt tokens that were not computed, because another response had.
        head_tokens: positions at which head and softmax ran.
        denoising_steps, forwards: over all sequences; a forward is a denoising step, or a pass that only commits.
        finished: responses. response_tokens: theirs.
        preemptions: sequences that lost their pages.
        seconds: 'schedule' (host), 'model' (the layers and the head), 'sample' (softmax, draw, unmasking), 'collect'
            (reading what happened). Rounds that are replayed whole are 'model'. On a GPU the host does not wait in
            between: only their sum means something there.
    """

    passes: int = 0
    denoise_tokens: int = 0
    commit_tokens: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    head_tokens: int = 0
    denoising_steps: int = 0
    forwards: int = 0
    finished: int = 0
    response_tokens: int = 0
    preemptions: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with profile.span(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        self.__init__()
