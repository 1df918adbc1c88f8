"""The clipped surrogate of RL with its penalties, over the targets of a row.

What has one ratio is a unit: a target, all targets of a token, or all targets of a response (rl/methods.py). With
coefficients a of its targets, a unit's log-ratio is

    delta = sum of a * (logp - logp_old),   r = exp(clamp(delta, -10, 10))

and with its advantage A and weight w

    loss = sum of w * ( -C(r, A) + beta * KL ),   C = min(r A, clip(r, 1 - eps, 1 + eps_high) A)

Dual clip (arXiv 1912.09729): C is at least c A where A < 0. KL is k1 = delta, k2 = delta^2 / 2 or
k3 = exp(clamp(-delta, -10, 10)) - 1 + delta (J. Schulman, "Approximating KL divergence"), of the old policy or of a
frozen one. The weights carry the whole normalisation (rl/normalise.py), so rows and ranks simply add up.

Source: TraceRL, arXiv 2509.06949, eq. 3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

MAX_LOG_RATIO = 10.0


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """Attributes:
    eps_clip, eps_clip_high: the ratio is clipped to [1 - eps_clip, 1 + eps_clip_high].
    kl_coef, kl_type: beta, and which estimator.
    eps_clip_c: c of the dual clip; None for none.
    policy_coef: weight of the surrogate; 0 learns by the penalties alone.
    tis: bounds (low, high) of importance weights; None where there are none.
    """

    eps_clip: float
    eps_clip_high: float
    kl_coef: float
    kl_type: str = "k3"
    eps_clip_c: float | None = None
    policy_coef: float = 1.0
    tis: tuple[float, float] | None = None

    def __call__(
        self,
        logprob: Tensor,
        old_logprob: Tensor | None,
        advantage: Tensor,
        weight: Tensor,
        unit: Tensor | None = None,
        coefficient: Tensor | None = None,
        kl_weight: Tensor | None = None,
        reference_logprob: Tensor | None = None,
        sampling_logprob: Tensor | None = None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one row of N targets in U units, and sums of its metrics.

        Args:
            logprob: [N], with gradient. old_logprob: [N]; None stands for `logprob` itself, without gradient.
            advantage, weight: [U].
            unit, coefficient: int64 and real [N], the unit of each target and its coefficient there; None where each
                target is a unit.
            kl_weight: [U]; None for `weight`.
            reference_logprob: [N], of the frozen policy that KL holds on to; None for the old one.
            sampling_logprob: [N], under the distribution that the tokens were drawn from; for `tis`, where each target
                is a unit.
            cp_group: ranks that share the row. With units of several targets each of them has all U units, with some of
                their targets; then it returns its share of the loss and of what is summed over units.

        Returns:
            loss: 0-d. metrics: 0-d sums; `targets` and `units` count; `ratio_max` is the largest ratio (0 if there are
            no targets).
        """
        old = logprob.detach() if old_logprob is None else old_logprob

        shared = cp_group if unit is not None else None
        ranks = 1 if shared is None else shared.size()

        def of_units(values: Tensor) -> Tensor:
            if unit is None:
                return values
            sums = values.new_zeros(len(advantage)).index_add(0, unit, coefficient * values)
            return sums if shared is None else all_reduce(sums, group=shared)

        delta = of_units(logprob - old)
        ratio = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - self.eps_clip, 1 + self.eps_clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        metrics = {
            "units": torch.full_like(ratio.sum(), float(advantage.numel())),
            "advantage": advantage.sum(),
            "advantage_squared": advantage.square().sum(),
            "ratio": ratio.sum(),
            "pg_clipfrac": (clipped * advantage < ratio * advantage).to(ratio.dtype).sum(),
            "ppo_kl": (-delta).sum(),
            "k3": kl(delta, "k3").sum(),
        }
        if self.eps_clip_c is not None:
            bounded = torch.where(advantage < 0, torch.maximum(surrogate, self.eps_clip_c * advantage), surrogate)
            metrics["pg_clipfrac_lower"] = (bounded > surrogate).to(ratio.dtype).sum()
            surrogate = bounded
        if self.tis is not None:
            importance = (old - sampling_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
            kept = importance.clamp(*self.tis)
            metrics |= {"tis": importance.sum(), "tis_clipfrac": (kept != importance).to(ratio.dtype).sum()}
            surrogate = kept * surrogate
        distance = delta
        if reference_logprob is not None:
            distance = of_units(logprob - reference_logprob)
            metrics["ref_k3"] = kl(distance, "k3").sum()
        pg_loss = -(weight * surrogate).sum()
        kl_loss = ((weight if kl_weight is None else kl_weight) * kl(distance, self.kl_type)).sum()
        metrics |= {"pg_loss": pg_loss, "kl_loss": kl_loss}
        loss = (self.policy_coef * pg_loss + self.kl_coef * kl_loss) / ranks
        own = {
            "targets": torch.full_like(loss, float(logprob.numel())),
            "ratio_max": torch.cat([ratio.new_zeros(1), ratio]).max(),
        }
        shares = {name: value / ranks for name, value in metrics.items()}
        return loss, {name: value.detach() for name, value in (own | shares).items()}


def kl(delta: Tensor, estimator: str) -> Tensor:
    """Per-sample estimate of KL(policy || other) from delta = logp - logp_other of samples from the policy."""
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return 0.5 * delta.square()
    return (-delta).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 + delta
