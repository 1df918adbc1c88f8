"""The value model of TraceRL: its optimizer, its loss, and the advantages that it is for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_dlm.config.optimizer import DecayStyle, IncreaseStyle, OptimizerConfig, WSDDecayStyle


@dataclass(slots=True)
class ValueConfig:
    """The diffusion value model."""

    use_value_model: bool = False
    """Learn a value for each token beside the policy, and take advantages from it (generalised advantage estimation
    over denoising steps). A second model of the policy's size is trained in the same processes."""
    value_load: str | None = None
    """Folder of a value model's checkpoint (SAVE/value of a run) to begin with; the policy's backbone with a zero head
    when it is not given. A run that is resumed goes on with its own."""
    gamma: float = 1.0
    """Discount of rewards and values per denoising step."""
    gae_lambda: float = 1.0
    """Lambda of the advantages: 1 takes the rewards that came, 0 trusts the value of the next step."""
    value_eps_clip: float = 0.2
    """A value's error counts at least as if it had moved by no more than this from the old value."""
    value_order: Literal["before", "after"] = "before"
    """Whether the value model is updated before the policy or after it. Advantages are those of the old values
    either way."""
    value_interval: int = 1
    """RL steps between updates of the value model."""
    value_warmup_steps: int = 0
    """RL steps at the beginning in which the value model alone is updated."""
    value_lr: float = 5e-6
    """Highest learning rate of the value model."""
    value_min_lr: float = 0.0
    """Learning rate at which its decaying schedule ends."""
    value_lr_decay_style: DecayStyle = "constant"
    """Shape of its schedule after the warm-up."""
    value_lr_wsd_decay_style: WSDDecayStyle = "exponential"
    """Shape of the end of its WSD schedule."""
    value_lr_wsd_decay_iters: int | None = None
    """Its optimizer steps at the end of a WSD schedule over which the learning rate goes down."""
    value_lr_warmup_iters: int = 0
    """Its optimizer steps over which the learning rate rises linearly from --value-lr-warmup-init."""
    value_lr_warmup_fraction: float | None = None
    """The same as a share of its schedule, rounded down to whole steps."""
    value_lr_warmup_init: float = 0.0
    """Learning rate at which its warm-up begins."""
    value_lr_decay_iters: int | None = None
    """Its optimizer step at which the decay ends, warm-up included; the length of the run when it is not given."""
    value_weight_decay: float = 0.0
    """Weight decay coefficient of the value model's matrices. Norms and biases do not decay."""
    value_weight_decay_incr_style: IncreaseStyle = "constant"
    """How the coefficient goes from --value-start-weight-decay to --value-end-weight-decay; constant stays at
    --value-weight-decay."""
    value_start_weight_decay: float | None = None
    """Its coefficient at the beginning of the run."""
    value_end_weight_decay: float | None = None
    """Its coefficient at the end of the run."""
    value_adam_beta1: float = 0.9
    """Decay of Adam's running mean of its gradients."""
    value_adam_beta2: float = 0.999
    """Decay of Adam's running mean of its squared gradients."""
    value_adam_eps: float = 1e-8
    """Term that keeps Adam's denominator from zero."""
    value_clip_grad: float = 1.0
    """Largest global gradient norm of the value model; 0 leaves gradients as they are."""


def optimizer_config(value: ValueConfig, policy: OptimizerConfig) -> OptimizerConfig:
    """The value model's optimizer: the policy's update rule and groups with numbers and a schedule of its own."""
    names = {field.name for field in dataclasses.fields(value)}
    own = {
        field.name: getattr(value, f"value_{field.name}")
        for field in dataclasses.fields(policy)
        if f"value_{field.name}" in names
    }
    return dataclasses.replace(policy, **own)


def learns_in(value: ValueConfig, step: int) -> bool:
    """Whether the value model is updated in an RL step, counted from 0. While the policy waits for it, in each."""
    return step < value.value_warmup_steps or step % value.value_interval == 0


def policy_updates(value: ValueConfig, last: int, per_step: int) -> int:
    """Updates of the policy in the RL steps before `last`, each of `per_step` updates: it may wait for the value model
    first.
    """
    return per_step * max(0, last - (value.value_warmup_steps if value.use_value_model else 0))


def num_updates(value: ValueConfig, first: int, last: int, per_step: int) -> int:
    """Updates of the value model in the RL steps from `first` to `last`, each of `per_step` updates."""
    return per_step * sum(learns_in(value, step) for step in range(first, last))
