"""From requests to what the child is asked for, and from its blocks to traces.

Where a response ends is decided here, by the rule of the engine: at the first stop token, else at its limit. SGLang
stops generating by the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.rollout.request import Request
from megatron_dlm.rollout.sglang.wire import Block, Rules, native_sampling


def order_for(request: Request, name: str) -> dict[str, Any]:
    """A request as the child takes it. A partial response is part of the prompt there."""
    partial, sampling = request.partial, request.sampling
    prompt = [int(token) for token in request.prompt_ids]
    if partial is not None:
        prompt += [int(token) for token in partial.response_ids]
    rules = Rules.of(sampling, request.stream, 0 if partial is None else partial.num_steps)
    return {
        "name": name,
        "prompt": prompt,
        "sampling": native_sampling(sampling, rules, request.tokens_left),
    }


def trace_of(request: Request, blocks: Sequence[Block], version: int, aborted: bool) -> Trace:
    """The trace of a response.

    Args:
        blocks: all that were finished.
        version: of the weights that decided them.
        aborted: the response may be incomplete; otherwise it must have an end.

    Raises:
        RuntimeError: blocks are missing.
    """
    partial, sampling = request.partial, request.sampling
    blocks = sorted(blocks, key=lambda block: block.start)
    before = len(request.prompt_ids) + request.num_done
    _check_run(blocks, before, sampling.block_size)
    skipped = before - blocks[0].start if blocks else 0
    join = lambda name: [value for block in blocks for value in getattr(block, name)][skipped:]
    ids, steps = join("ids"), join("steps")
    end, reason = _end(ids, sampling, request.tokens_left)
    if reason is None:
        if not aborted:
            raise RuntimeError(f"SGLang ended the response to {request.prompt_key} before its end")
        reason = "abort"
    return Trace(
        prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
        response_ids=_whole(partial, "response_ids", ids[:end], np.int64),
        tail_ids=np.asarray(ids[end:], dtype=np.int64),
        steps=_whole(partial, "steps", steps[:end], np.int64),
        tail_steps=np.asarray(steps[end:], dtype=np.int64),
        logprobs=_whole(partial, "logprobs", join("logprobs")[:end], np.float64),
        sampling_logprobs=_whole(partial, "sampling_logprobs", join("sampling_logprobs")[:end], np.float64),
        weight_versions=_whole(partial, "weight_versions", [version] * end, np.int64),
        sampling=sampling,
        prompt_key=request.prompt_key,
        sample=request.sample,
        finish_reason=reason,
        num_forwards=sum(block.forwards for block in blocks) + (0 if partial is None else partial.num_forwards),
    )


def _whole(partial: Trace | None, name: str, new: list, dtype: type) -> np.ndarray:
    added = np.asarray(new, dtype=dtype)
    return added if partial is None else np.concatenate([getattr(partial, name), added]).astype(dtype)


def _check_run(blocks: Sequence[Block], first: int, size: int) -> None:
    """Raises RuntimeError unless the blocks follow each other from the one that holds position `first`."""
    starts = [block.start for block in blocks]
    if starts != [first // size * size + index * size for index in range(len(starts))]:
        raise RuntimeError(f"SGLang returned the blocks at {starts} of a response that begins at {first}")


def _end(ids: Sequence[int], sampling: Any, limit: int) -> tuple[int, str | None]:
    """Length of the response among its tokens, and why it ends; None where it does not."""
    if not sampling.ignore_eos:
        for index, token in enumerate(ids[:limit]):
            if token in sampling.stop_token_ids:
                return index + 1, "stop"
    return (limit, "length") if len(ids) >= limit else (len(ids), None)
