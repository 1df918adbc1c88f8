"""TraceRL: its prompts, the size of its updates, and its objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class RLConfig:
    """TraceRL."""

    prompt_data: list[str] = field(default_factory=list)
    """Prompt sources: JSONL files, or reasoning_gym:NAME with optional settings such as ?size=1000&seed=1."""
    num_rollout: int = 100
    """Number of RL steps (rollout, reward, update)."""
    global_batch_size: int | None = None
    """Responses per update; give this or --num-steps-per-rollout."""
    num_steps_per_rollout: int | None = None
    """Updates per RL step; give this or --global-batch-size."""
    max_tokens_per_row: int = 4096
    """Token budget of a packed row, noisy copies included."""
    eps_clip: float = 0.2
    """Ratios of new to old policy are clipped below 1 minus this."""
    eps_clip_high: float | None = None
    """Ratios are clipped above 1 plus this; --eps-clip when it is not given."""
    kl_loss_coef: float = 0.01
    """Weight of the KL penalty in the loss."""
    loss_aggregation: Literal["constant", "response", "token"] = "constant"
    """What the sum of token losses is divided by: a constant length, the response's length, or the number of tokens."""
    shrinkage: int = 1
    """Number of neighbouring denoising steps of a trace that are learned as one."""
    grid_anchor: Literal["absolute", "response"] = "absolute"
    """Where training counts its blocks from: the start of the sequence, as generation does, or of the response."""
    use_rollout_logprobs: bool = False
    """Take the log-probabilities of the rollout as the old policy instead of computing them again (not with --bf16).
    With --partial-rollout they are those of the weights that decided each token, some older than this step's."""
    normalize_advantages_by_std: bool = True
    """Divide advantages by the standard deviation of the rewards in their group."""
    min_group_accuracy: float = 0.2
    """Leave out groups whose share of right responses is lower."""
    max_group_accuracy: float = 0.8
    """Leave out groups whose share of right responses is higher."""
    max_empty_steps: int = 10
    """Save and give up after so many RL steps in a row in which no group was left to learn from."""
    overlong_margin: int = 5
    """A response that ends within this many tokens of the longest allowed length counts as wrong."""
    log_samples: int = 4
    """Responses of each RL step that are appended to samples.jsonl in --save, to be read; 0 for none."""
    offload_train: bool = False
    """Move the policy's optimizer state to host memory, and free its gradients, while responses are generated. The KV
    cache gets larger by that with --offload-rollout only; otherwise it has to fit beside them while the policy is
    trained. Every RL step pays for two transfers of the optimizer state, so it is off by default."""
    offload_rollout: bool = False
    """Free the KV cache while the policy is trained. With --offload-train it may be as large as what then is free."""
    save_debug_rollout_data: str | None = None
    """Folder to which all rollouts are written as JSONL."""
