"""Low-rank adapters that cannot be, refused before anything is built. The rules are those of `validate`."""

from __future__ import annotations

from megatron_dlm.config.checkpoint import LoadConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.lora import OF_MLP, LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.config.validate import above, at_least, only_with


def check_lora(lora: LoraConfig) -> None:
    """Refuse settings that no model could work with, or that nobody would read."""
    if not lora.wanted:
        only_with(lora, "lora_alpha", "--lora-rank")
        only_with(lora, "lora_target_modules", "--lora-rank")
        return
    at_least(lora, 1, "lora_rank")
    above(lora, 0, "lora_alpha")
    targets = lora.lora_target_modules
    if not targets or len(set(targets)) != len(targets):
        raise ConfigError(
            f"--lora-target-modules {' '.join(targets) or '(empty)'} must name each layer once. Use one or more of "
            "linear_qkv, linear_proj, linear_fc1 and linear_fc2."
        )


def check_lora_of_model(lora: LoraConfig, model: ModelConfig, rollout: EngineConfig | None = None) -> None:
    """Refuse adapters that do not go with this model, or with the engine of its rollouts."""
    if not lora.wanted:
        return
    of_mlp = [name for name in lora.lora_target_modules if name in OF_MLP]
    if model.num_experts is not None and of_mlp:
        raise ConfigError(
            f"--lora-target-modules {' '.join(of_mlp)} would be layers of experts, which cannot have adapters. Use "
            "linear_qkv and linear_proj."
        )
    if rollout is not None and rollout.rollout_backend == "sglang":
        raise ConfigError(
            "--lora-rank does not work with --rollout-backend sglang. Leave it out, or use --rollout-backend native."
        )


def check_lora_weights(lora: LoraConfig, checkpoint: LoadConfig) -> None:
    """Refuse adapters beside weights that nobody has trained."""
    if lora.wanted and checkpoint.load is None and checkpoint.hf_checkpoint is None:
        raise ConfigError(
            f"--lora-rank {lora.lora_rank} needs weights to adapt, and new ones would stay random. Give --load or "
            "--hf-checkpoint."
        )
