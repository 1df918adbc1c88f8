"""What RL minimises, and on which states of a response.

A field that is None by default is filled by the method (`METHODS`): by what its paper describes, where that says it, or
by what TraceRL uses (the clips of espo and ebpo). Each choice can still be replaced.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar


@dataclass(slots=True)
class ObjectiveConfig:
    """What RL minimises."""

    rl_method: Literal["tracerl", "random_masking", "coupled", "dipo", "slim_rl", "espo", "ebpo", "opd"] = "tracerl"
    """Which states of a response are learned, and what is compared in them: those in which its tokens were decided
    (tracerl, dipo; opd, on-policy distillation from a teacher), or masks that are drawn (random_masking, coupled), by
    the likelihood of the whole response (slim_rl, espo, ebpo)."""
    policy_loss_coef: float | None = None
    """Weight of the clipped surrogate in the loss; 1 unless the method says otherwise."""
    eps_clip: float | None = None
    """Ratios of new to old policy are clipped below 1 minus this; 0.2 unless the method says otherwise."""
    eps_clip_high: float | None = None
    """Ratios are clipped above 1 plus this; --eps-clip when it is not given."""
    eps_clip_c: float | None = None
    """Bound the loss of a bad response at this many times its advantage, whatever the ratio (dual clip); above 1."""
    loss_aggregation: Literal["constant", "longest", "slice", "response", "token"] | None = None
    """What the sum of token losses is divided by: the longest response allowed (constant), or the longest of the step
    (longest), times the number of responses; or it is the mean over slices (the tokens decided in one step), over
    responses, or over tokens. constant unless the method says otherwise."""
    normalize_advantages_by_std: bool | None = None
    """Divide advantages by the standard deviation of the rewards in their group; on unless the method says
    otherwise."""
    old_logprobs: Literal["recomputed", "rollout", "current"] | None = None
    """The old policy's log-probabilities: computed again before the first update; those of the rollout (not with
    --bf16; with --partial-rollout they are of the weights that decided each token, some older than this step's); or
    those of the weights that are being updated, so that every ratio is 1. With --rollout-block-size other than the
    model's, those of the rollout are of its smaller states, and draw the model to decide alike in its own. recomputed
    unless the method says otherwise."""
    kl_loss_coef: float | None = None
    """Weight of the KL penalty in the loss; 0.01 unless the method says otherwise."""
    kl_loss_type: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL penalty; k3 unless the method says otherwise."""
    kl_reference: Literal["old", "frozen"] = "old"
    """The policy that the KL penalty holds on to: the one before this RL step, or the model of --ref-load."""
    kl_aggregation: Literal["same", "slice_sum"] = "same"
    """How the KL penalty is summed: as the rest of the loss, or as the mean over slices of its sum in each."""
    ref_load: str | None = None
    """Checkpoint folder of the frozen reference model."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, which is then raised."""
    use_tis: bool = False
    """Weight each token by the ratio of the old policy to the distribution that the rollout drew it from (truncated
    importance sampling)."""
    tis_clip: float = 2.0
    """Largest weight of --use-tis."""
    tis_clip_low: float = 0.0
    """Smallest weight of --use-tis."""
    distill_coef: float | None = None
    """Weight of the divergence from the teacher at the tokens that are learned; 0 unless the method is opd, where it is
    1."""
    distill_kl: Literal["reverse", "forward", "jsd"] = "reverse"
    """Divergence from the teacher: KL(model || teacher), KL(teacher || model), or Jensen-Shannon."""
    teacher_load: str | None = None
    """Checkpoint folder of the teacher, a diffusion or an autoregressive model with the same tokenizer."""
    shrinkage: int = 1
    """Number of neighbouring denoising steps of a trace that are learned as one."""
    grid_anchor: Literal["absolute", "response"] = "absolute"
    """Where training counts its blocks from: the start of the sequence, as generation does, or of the response."""
    learn_stop_token: bool = True
    """Learn the token that ends a response."""
    mask_draws: int | None = None
    """How often masks are drawn for a response (pairs of them, where they are complementary), or the number of mask
    ratios at which slim_rl and ebpo integrate."""
    mask_ratio_per: Literal["response", "block", "token"] = "response"
    """What shares a mask ratio where masks are drawn: the tokens of a response, those of a block, or none."""
    mask_ratio_low: float = 0.1
    """Smallest mask ratio that is drawn."""
    mask_ratio_high: float = 0.9
    """Largest mask ratio that is drawn."""
    mask_ratio_spread: float = 0.2
    """How much higher than the mean slim_rl masks the first block of a response, and how much lower the last."""
    coupled_estimator: Literal["rows", "paired"] = "rows"
    """What coupled compares: each mask of a pair for itself, or per token the mean of its log-probabilities under its
    mask of the pair and under a mask of everything."""
    bf16_logprobs: bool = False
    """Compute log-probabilities in bfloat16, as the published code of TraceRL does; 8 bits are little for a ratio."""
    reset_optimizer: bool = False
    """Forget the optimizer's state before each RL step, and what its weights have beyond the model's precision, as
    the published code of TraceRL does."""
    shuffle_responses: bool = True
    """Deal responses to the updates of a step in random order, not in that of their prompts."""


_COMMON = dict(
    policy_loss_coef=1.0,
    eps_clip=0.2,
    loss_aggregation="constant",
    normalize_advantages_by_std=True,
    old_logprobs="recomputed",
    kl_loss_coef=0.01,
    kl_loss_type="k3",
    distill_coef=0.0,
    mask_draws=1,
)

METHODS: dict[str, dict[str, Any]] = {
    "tracerl": {},
    "random_masking": {},
    "coupled": {},
    "dipo": dict(loss_aggregation="token", normalize_advantages_by_std=False, old_logprobs="current", kl_loss_coef=0.0),
    "slim_rl": dict(eps_clip=0.1, loss_aggregation="response", normalize_advantages_by_std=False, mask_draws=3),
    "espo": dict(loss_aggregation="response", kl_loss_type="k2", mask_draws=1),
    "ebpo": dict(loss_aggregation="response", kl_loss_coef=0.0, kl_loss_type="k2", mask_draws=3),
    "opd": dict(
        policy_loss_coef=0.0, distill_coef=1.0, kl_loss_coef=0.0, loss_aggregation="token", old_logprobs="current"
    ),
}
"""What each method sets apart from `_COMMON`. Sources: rl/methods.py."""

Config = TypeVar("Config", bound=ObjectiveConfig)


def with_method(config: Config) -> Config:
    """The same settings with every field filled that its method decides on and the user did not."""
    wanted = _COMMON | METHODS[config.rl_method]
    return dataclasses.replace(
        config, **{name: value for name, value in wanted.items() if getattr(config, name) is None}
    )
