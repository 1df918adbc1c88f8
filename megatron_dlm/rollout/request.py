"""What the engine is asked for, and what makes a request impossible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dlm.config.errors import DataError
from megatron_dlm.diffusion.keys import stream
from megatron_dlm.diffusion.trace import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be generated.

    Attributes:
        prompt_ids: int64 [P], P >= 1.
        sampling: how.
        prompt_key, sample: which prompt, and which of its responses.
        stream: the key of all its draws (`rollout_stream`).
    """

    prompt_ids: np.ndarray
    sampling: SamplingParams
    prompt_key: str
    sample: int
    stream: int

    @property
    def max_length(self) -> int:
        """Tokens of the text at its longest, its terminal block included."""
        block = self.sampling.block_size
        return -(-(len(self.prompt_ids) + self.sampling.max_new_tokens) // block) * block


def rollout_stream(seed: int, step: int, prompt_key: str, sample: int) -> int:
    """The key of a response's draws: a function of what it is, not of where or when it is made."""
    return stream(seed, "rollout", step, prompt_key, sample)


def check(request: Request, max_length: int) -> None:
    """Raises DataError when the request can never run."""
    if len(request.prompt_ids) == 0:
        raise DataError(f"Prompt {request.prompt_key} has no tokens. Give every prompt at least one token.")
    if request.max_length > max_length:
        raise DataError(
            f"Prompt {request.prompt_key} has {len(request.prompt_ids)} tokens; with "
            f"{request.sampling.max_new_tokens} new ones it needs {request.max_length}, more than the {max_length} "
            "of the cache. Shorten the prompt or the response."
        )
