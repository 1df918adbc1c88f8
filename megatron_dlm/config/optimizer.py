"""The optimizer and its learning-rate schedule, counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSDDecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]
IncreaseStyle = Literal["constant", "linear", "cosine"]


@dataclass(slots=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Update rule; adam decays weights separately from the gradient (AdamW)."""
    lr: float = 1e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at which a decaying schedule ends."""
    lr_decay_style: DecayStyle = "constant"
    """Shape of the schedule after the warm-up. WSD stays at --lr and goes down over the last --lr-wsd-decay-iters."""
    lr_wsd_decay_style: WSDDecayStyle = "exponential"
    """Shape of the end of a WSD schedule."""
    lr_wsd_decay_iters: int | None = None
    """Optimizer steps at the end of a WSD schedule over which the learning rate goes down to --min-lr."""
    lr_warmup_iters: int = 0
    """Optimizer steps over which the learning rate rises linearly from --lr-warmup-init."""
    lr_warmup_fraction: float | None = None
    """The same as a share of the schedule (--lr-decay-iters, or the run), rounded down to whole steps."""
    lr_warmup_init: float = 0.0
    """Learning rate at which the warm-up begins."""
    lr_decay_iters: int | None = None
    """Optimizer step at which the decay ends, warm-up included; the length of the run when it is not given."""
    weight_decay: float = 0.0
    """Weight decay coefficient of matrices. Norms and biases do not decay."""
    weight_decay_incr_style: IncreaseStyle = "constant"
    """How the coefficient goes from --start-weight-decay to --end-weight-decay over the run; constant stays at
    --weight-decay."""
    start_weight_decay: float | None = None
    """Coefficient at the beginning of the run."""
    end_weight_decay: float | None = None
    """Coefficient at the end of the run."""
    no_weight_decay_embeddings: bool = False
    """Leave the embedding table without weight decay, too (and with tied embeddings the head, which is the same)."""
    adam_beta1: float = 0.9
    """Decay of Adam's running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of Adam's running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Term that keeps Adam's denominator from zero."""
    sgd_momentum: float = 0.0
    """Momentum of SGD."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    optimizer_cpu_offload: bool = False
    """Keep master weights and moments in host memory, and update there. It needs --bf16 and
    --use-distributed-optimizer, and makes room on the device at the price of slower updates."""
    optimizer_offload_fraction: float = 1.0
    """Share of them that is kept in host memory."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Copy gradients and weights between host and device while the host updates other ones."""


def warmup_steps(optimizer: OptimizerConfig, steps: int) -> int:
    """Optimizer steps of the warm-up of a schedule of `steps`."""
    if optimizer.lr_warmup_fraction is not None:
        return int(optimizer.lr_warmup_fraction * steps)
    return optimizer.lr_warmup_iters
