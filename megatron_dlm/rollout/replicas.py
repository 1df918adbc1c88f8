"""Rollout over all replicas: who generates what, and one call that does it.

Each replica of the rollout layout takes every n-th prompt, with all its samples, so that the responses to a prompt stay
together. What is generated does not depend on that: every draw is keyed by prompt and sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dlm.data.prompts import Prompt
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.request import Request, rollout_stream


@dataclass(frozen=True, slots=True)
class Job:
    """What a rollout is for. Two rollouts of the same prompts draw alike when, and only when, their jobs are equal.

    Attributes:
        seed: of the run.
        step: RL step; 0 for an evaluation, which is to draw alike at every step.
        tag: tells apart rollouts for different purposes at the same step.
    """

    seed: int
    step: int
    tag: str = "train"


def requests_for(prompts: Sequence[Prompt], samples: int, sampling: SamplingParams, job: Job) -> list[Request]:
    """All requests for these prompts: `samples` responses each, in order of prompt, then sample."""
    return [
        Request(
            np.asarray(prompt.token_ids, dtype=np.int64),
            sampling,
            prompt.key,
            sample,
            rollout_stream(job.seed, job.step, f"{job.tag}/{prompt.key}", sample),
        )
        for prompt in prompts
        for sample in range(samples)
    ]


def generate(engine: Engine, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Trace]:
    """Run requests on this replica's engine; traces in the order of the requests.

    Args:
        requests: no two with the same prompt key and sample.
        progress: called with the number of responses that a pass completed.
    """
    order = {(request.prompt_key, request.sample): index for index, request in enumerate(requests)}
    traces: list[Trace | None] = [None] * len(requests)
    engine.submit(requests)
    while not engine.idle:
        finished = engine.step()
        for trace in finished:
            traces[order[trace.prompt_key, trace.sample]] = trace
        if progress is not None and finished:
            progress(len(finished))
    return traces
