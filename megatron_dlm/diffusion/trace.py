"""A trace: one response and how it came to be.

Every producer (our engine, other engines, a file) and every consumer (TraceRL, `score`, evaluation) uses this one
record. It holds token ids from end to end, never text that would have to be tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

TRACE_VERSION = 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a response is drawn.

    Attributes:
        temperature: 0 is greedy, and the policy is then taken at temperature 1.
        top_k, top_p: shape the draw only; 0 and 1.0 switch them off.
        max_new_tokens: longest response, in tokens.
        block_size: tokens that are decoded together.
        denoising_steps: most denoising steps per block, 1 to block_size.
        remasking: 'static', 'dynamic', 'sequential' or 'entropy_bounded' (unmasking.Remasking).
        threshold: confidence above which the dynamic policy unmasks.
        confidence: what positions are ranked by: 'sampled', 'untempered', 'margin' or 'entropy' (sampling.Confidence);
            under 'entropy_bounded' always 'entropy', whatever is set.
        entropy_bound: nats that the tokens of one step may add up to under the entropy-bounded policy.
        stop_token_ids: tokens that end a response, the stop token included in it.
        ignore_eos: do not stop at them.
        prefix_cache: full attention only: within a block's steps keep the keys of the text before it as its first step
            wrote them.
        horizon: full attention only: how many positions after the block are shown to the model, as masks; None is all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    block_size: int = 4
    denoising_steps: int = 4
    remasking: str = "dynamic"
    threshold: float = 0.9
    confidence: str = "sampled"
    entropy_bound: float = 0.35
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prefix_cache: bool = True
    horizon: int | None = None

    @property
    def policy_temperature(self) -> float:
        return self.temperature if self.temperature > 0 else 1.0

    @property
    def ranked_by(self) -> str:
        """The confidence that is in force (sampling.Confidence, in lower case)."""
        return "entropy" if self.remasking == "entropy_bounded" else self.confidence


@dataclass(slots=True)
class Trace:
    """One response with its step map.

    Attributes:
        prompt_ids: int64 [P].
        response_ids: int64 [R], ending at the stop token or at max_new_tokens.
        tail_ids: int64, the rest of the terminal block: context of the tokens unmasked later in it, but no part of the
            response.
        steps: int64 [R], 1-based denoising step of the response at which each token was unmasked.
        tail_steps: int64, likewise for the tail.
        logprobs: float [R], of each token under the policy in the state in which it was unmasked.
        sampling_logprobs: float [R], under the distribution that it was drawn from.
        weight_versions: int64 [R], version of the weights that decided each token.
        sampling: the parameters of the draw.
        prompt_key, sample: which prompt, and which of its responses.
        finish_reason: 'stop', 'length' or 'abort'.
        num_forwards: denoising passes, plus passes that only commit a block; prefill not counted.
        routed_experts: int [R, layers, top-k] of a mixture of experts, where recorded.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    tail_ids: np.ndarray
    steps: np.ndarray
    tail_steps: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    weight_versions: np.ndarray
    sampling: SamplingParams
    prompt_key: str
    sample: int
    finish_reason: str
    num_forwards: int
    routed_experts: np.ndarray | None = None
    version: int = field(default=TRACE_VERSION)

    @property
    def num_steps(self) -> int:
        """Denoising steps spent on the response and its terminal block."""
        return int(max(self.steps.max(initial=0), self.tail_steps.max(initial=0)))

    @property
    def tokens(self) -> np.ndarray:
        """int64 [P + R + tail]."""
        return np.concatenate([self.prompt_ids, self.response_ids, self.tail_ids])

    @property
    def canvas_length(self) -> int:
        """Under full attention, tokens of the text that the rollout showed to the model: the prompt and the longest
        response, masks where nothing was decided.
        """
        return max(len(self.prompt_ids) + self.sampling.max_new_tokens, len(self.tokens))

    @property
    def all_steps(self) -> np.ndarray:
        """int64 [R + tail]."""
        return np.concatenate([self.steps, self.tail_steps])


def shrink(steps: np.ndarray, shrinkage: int) -> np.ndarray:
    """Merge every `shrinkage` consecutive distinct steps of a window into the last of them.

    Args:
        steps: int [n], the steps of one window (a block; the whole response under full attention).
        shrinkage: how many decided steps the model learns as one.

    Returns:
        int [n], each step replaced by the largest of its merged group.

    Source: TraceRL, arXiv 2509.06949, section 4.1
    """
    distinct, rank = np.unique(steps, return_inverse=True)
    last_of_group = np.minimum((np.arange(len(distinct)) // shrinkage + 1) * shrinkage, len(distinct)) - 1
    return distinct[last_of_group][rank]
