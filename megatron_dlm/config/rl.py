"""RL: its prompts, the size of its updates, and which responses it learns from."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dlm.config.objective import ObjectiveConfig


@dataclass(slots=True)
class RLConfig(ObjectiveConfig):
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
    """Token budget of a packed row, noisy copies included; under context parallelism of the whole row, of which
    each process holds a part."""
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
