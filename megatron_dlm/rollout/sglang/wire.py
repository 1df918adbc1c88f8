"""What crosses from trainer to child and back, as plain data: the rules of a request, and finished blocks.

A request's rules travel in SGLang's `custom_params`, which allow scalars only; SGLang's own sampling parameters stay at
values that change nothing, but for where a response ends. A block comes back whole, whatever SGLang cuts off behind the
end of the response: the tokens after it were context of others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_dlm.diffusion.trace import SamplingParams

KEY = "megatron_dlm"  # of our blocks in a response's meta_info


@dataclass(frozen=True, slots=True)
class Rules:
    """How one request is denoised.

    Attributes:
        stream: key of its draws.
        taken: denoising steps that the response has behind it, if it goes on from a partial one.
        the others: as in SamplingParams; `confidence` is the one in force.
    """

    stream: int
    taken: int
    temperature: float
    top_k: int
    top_p: float
    denoising_steps: int
    remasking: str
    threshold: float
    confidence: str
    entropy_bound: float

    @classmethod
    def of(cls, sampling: SamplingParams, stream: int, taken: int = 0) -> Rules:
        return cls(
            int(stream),
            int(taken),
            float(sampling.temperature),
            int(sampling.top_k),
            float(sampling.top_p),
            int(sampling.denoising_steps),
            sampling.remasking,
            float(sampling.threshold),
            sampling.ranked_by,
            float(sampling.entropy_bound),
        )

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> Rules:
        """
        Raises:
            TypeError: other fields than those of this class.
        """
        return cls(**values)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def policy_temperature(self) -> float:
        return self.temperature if self.temperature > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Block:
    """One finished block of a response.

    Attributes:
        start: its first position in the text.
        ids, steps, logprobs, sampling_logprobs: [B], as in a Trace; steps are 0 at positions of the prompt.
        forwards: passes that it took, the one that commits it included.
    """

    start: int
    ids: list[int]
    steps: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    forwards: int

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> Block:
        return cls(**values)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


def native_sampling(sampling: SamplingParams, rules: Rules, left: int) -> dict[str, Any]:
    """SGLang's sampling parameters of a request that may still grow by `left` tokens."""
    return {
        "max_new_tokens": left,
        "stop_token_ids": sorted(int(token) for token in sampling.stop_token_ids),
        "ignore_eos": bool(sampling.ignore_eos),
        "temperature": 1.0,
        "stream_interval": 1,  # so that a request that is aborted has told of all blocks that it finished
        "custom_params": rules.to_wire(),
    }
