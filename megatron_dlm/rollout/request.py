"""What the engine is asked for, and what makes a request impossible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dlm.config.errors import DataError
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.rollout.pages import PrefixKey


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be generated.

    Attributes:
        prompt_ids: int64 [P], P >= 1.
        sampling: how.
        prompt_key, sample: which prompt, and which of its responses.
        stream: the key of all its draws (`rollout_stream`).
        partial: what an engine returned for this request when it was aborted; it goes on from there.
    """

    prompt_ids: np.ndarray
    sampling: SamplingParams
    prompt_key: str
    sample: int
    stream: int
    partial: Trace | None = None

    @property
    def num_done(self) -> int:
        """Response tokens that exist already."""
        return 0 if self.partial is None else len(self.partial.response_ids)

    @property
    def tokens_left(self) -> int:
        """Most tokens that are still to come."""
        return self.sampling.max_new_tokens - self.num_done

    @property
    def prefix_key(self) -> PrefixKey:
        """Equal for requests whose prompts have the same full blocks."""
        block = self.sampling.block_size
        full = len(self.prompt_ids) - len(self.prompt_ids) % block
        return np.ascontiguousarray(self.prompt_ids[:full], dtype=np.int64).tobytes(), block

    def text_end(self, full_attention: bool = False) -> int:
        """Tokens of the text at its longest, in a model of attention blocks with the rest of its terminal block."""
        length = len(self.prompt_ids) + self.sampling.max_new_tokens
        block = self.sampling.block_size
        return length if full_attention else -(-length // block) * block


def rollout_stream(seed: int, step: int, prompt_key: str, sample: int) -> int:
    """The key of a response's draws: a function of what it is, not of where or when it is made."""
    return stream(seed, "rollout", step, prompt_key, sample)


def check(request: Request, max_length: int, full_attention: bool = False) -> None:
    """Raises DataError when the request can never run."""
    prompt, sampling = len(request.prompt_ids), request.sampling
    if prompt == 0:
        raise DataError(f"Prompt {request.prompt_key} has no tokens. Give every prompt at least one token.")
    needed = request.text_end(full_attention)
    if needed > max_length:
        raise DataError(
            f"Prompt {request.prompt_key} has {prompt} tokens; with {sampling.max_new_tokens} new ones it needs "
            f"{needed}, more than the {max_length} of the cache. Shorten the prompt or the response."
        )
    if not 1 <= sampling.denoising_steps <= sampling.block_size:
        raise DataError(
            f"Prompt {request.prompt_key} is to take {sampling.denoising_steps} denoising steps per block of "
            f"{sampling.block_size} tokens. Use 1 to {sampling.block_size}."
        )
    if request.partial is None and sampling.max_new_tokens < 1:
        raise DataError(
            f"Prompt {request.prompt_key} is to have {sampling.max_new_tokens} new tokens. Ask for at least one."
        )
    if request.partial is None:
        return
    if request.partial.finish_reason != "abort" or request.tokens_left < 1:
        raise DataError(
            f"Response {request.sample} to prompt {request.prompt_key} cannot go on: it ended "
            f"({request.partial.finish_reason}) with {request.num_done} of {sampling.max_new_tokens} tokens. Only "
            "aborted responses below the longest length are continued."
        )
    if request.num_done and (request.num_done + (0 if full_attention else prompt)) % sampling.block_size:
        raise DataError(
            f"Response {request.sample} to prompt {request.prompt_key} cannot go on in blocks of "
            f"{sampling.block_size}: its {prompt} + {request.num_done} tokens end inside a block. Continue it with the "
            "block size that it was begun with."
        )
