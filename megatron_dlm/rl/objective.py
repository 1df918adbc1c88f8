"""The clipped surrogate of TraceRL with its proximal penalty, over the targets of a row.

With ratio r = exp(clamp(logp - logp_old, -10, 10)), advantage A and weight w of each target:

    loss = sum of w * ( -min(r A, clip(r, 1 - eps, 1 + eps_high) A) + beta * k3 ),   k3 = exp(clamp(logp_old - logp,
    -10, 10)) - 1 + (logp - logp_old)

The weights carry the whole normalisation (`response_weights`), so rows and ranks simply add up.

Source: TraceRL, arXiv 2509.06949, eq. 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_LOG_RATIO = 10.0


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """Attributes: eps_clip, eps_clip_high: the ratio is clipped to [1 - eps_clip, 1 + eps_clip_high]. kl_coef: beta."""

    eps_clip: float
    eps_clip_high: float
    kl_coef: float

    def __call__(
        self, logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one row and sums of its metrics.

        Args:
            logprob: [N], with gradient. old_logprob, advantage, weight: [N].

        Returns:
            loss: 0-d. metrics: 0-d sums over targets; `targets` is their number, `ratio_max` the largest ratio (0 if
            there are no targets).
        """
        delta = logprob - old_logprob
        ratio = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - self.eps_clip, 1 + self.eps_clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        k3 = (-delta).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 + delta
        pg_loss, kl_loss = -(weight * surrogate).sum(), (weight * k3).sum()
        metrics = {
            "targets": torch.full_like(pg_loss, float(logprob.numel())),
            "pg_loss": pg_loss,
            "kl_loss": kl_loss,
            "ratio": ratio.sum(),
            "ratio_max": torch.cat([ratio.new_zeros(1), ratio]).max(),
            "pg_clipfrac": (clipped * advantage < ratio * advantage).to(ratio.dtype).sum(),
            "ppo_kl": (-delta).sum(),
            "k3": k3.sum(),
        }
        return pg_loss + self.kl_coef * kl_loss, {name: value.detach() for name, value in metrics.items()}


def response_weights(num_targets: Sequence[int], aggregation: str, max_response_len: int) -> np.ndarray:
    """Weight of every target of each response of one update.

    Args:
        num_targets: [R], learned tokens per response.
        aggregation: 'constant' divides by R x the longest allowed response (Dr. GRPO, arXiv 2503.20783): every token
            counts the same, whatever its response. 'response' is the mean over responses of the mean over their tokens.
            'token' is the mean over all tokens.
        max_response_len: tokens.

    Returns:
        float64 [R].
    """
    counts = np.asarray(num_targets, dtype=np.float64)
    if aggregation == "constant":
        return np.full(len(counts), 1 / (len(counts) * max_response_len))
    if aggregation == "response":
        return 1 / (len(counts) * np.maximum(counts, 1))
    return np.full(len(counts), 1 / max(counts.sum(), 1))
