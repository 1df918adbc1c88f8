"""Drawing one token per masked position from the policy.

The policy is a distribution over the vocabulary (model/policy.py). top-k and top-p shape only what is drawn;
temperature 0 takes the most likely token. Each position spends one uniform number through the inverse of its cumulative
distribution in token order, so a draw depends on its key and its distribution, not on the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """What was drawn at N positions; each [N].

    token: int64. logprob: log-probability under the policy. sampling_logprob: under the distribution that was drawn
        from (after top-k and top-p).
    confidence: probability of the token as the unmasking policy reads it: that of the sampling distribution, or of the
        policy where temperature is 0.
    """

    token: Tensor
    logprob: Tensor
    sampling_logprob: Tensor
    confidence: Tensor


def draw(policy: Tensor, uniform: Tensor, greedy: Tensor, top_k: Tensor, top_p: Tensor) -> Draws:
    """Sample from log-probabilities.

    Args:
        policy: [N, V] log-probabilities (fp32 or fp64), already tempered, -inf for banned tokens.
        uniform: float64 [N] in [0, 1).
        greedy: bool [N]: take the most likely token (lowest id among equals).
        top_k: int [N]: keep the k most likely tokens; 0 keeps all.
        top_p: float [N]: keep the smallest set of most likely tokens that holds this much probability; 1 keeps all.
    """
    shaped, filtered = policy, torch.nonzero((top_k > 0) | (top_p < 1))[:, 0]
    if len(filtered):  # only these rows: the draw of a request must not depend on what others ask for
        shaped = policy.index_copy(0, filtered, _filter(policy[filtered], top_k[filtered], top_p[filtered]))
    cumulative = shaped.double().exp().cumsum(-1)  # [N, V]
    goal = uniform[:, None] * cumulative[:, -1:]  # below the total, because uniforms have 53 bits and are below 1
    sampled = torch.searchsorted(cumulative, goal, right=True)[:, 0]
    token = torch.where(greedy, policy.argmax(-1), sampled)
    pick = token[:, None]
    logprob = policy.gather(1, pick)[:, 0]
    sampling_logprob = torch.where(greedy, torch.zeros_like(logprob), shaped.gather(1, pick)[:, 0])
    return Draws(token, logprob, sampling_logprob, torch.where(greedy, logprob, sampling_logprob).exp())


def _filter(policy: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Log-probabilities renormalised over the tokens that top-k, then top-p of what is left, keep."""
    ordered, index = torch.sort(policy.double(), dim=-1, descending=True, stable=True)
    rank = torch.arange(policy.shape[-1], device=policy.device)
    allowed = torch.where(top_k > 0, top_k, policy.shape[-1])
    ordered = torch.where(rank < allowed[:, None], ordered, float("-inf")).log_softmax(-1)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # probability of the tokens ranked ahead
    ordered = torch.where(
        (before < top_p[:, None]) | (top_p >= 1)[:, None] | (rank == 0), ordered, float("-inf")
    ).log_softmax(-1)
    return torch.full_like(policy, float("-inf")).scatter(1, index, ordered.to(policy.dtype))
