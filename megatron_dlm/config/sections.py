"""All sections of the settings: the name that a section has in a YAML file, and its dataclass.

A command names the sections that it reads (`pick`). Two sections may share a field name only if no command reads both
(`sft` and `rl` do).
"""

from __future__ import annotations

from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.eval import EvalConfig
from megatron_dlm.config.log import LoggingConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.reward import RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import RolloutConfig
from megatron_dlm.config.run import RunConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.tokenizer import TokenizerConfig

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "tokenizer": TokenizerConfig,
    "sft": SFTConfig,
    "rollout": RolloutConfig,
    "rl": RLConfig,
    "reward": RewardConfig,
    "eval": EvalConfig,
    "run": RunConfig,
}


def pick(*names: str) -> dict[str, type]:
    """The sections that a command reads, in the order of its --help."""
    return {name: SECTIONS[name] for name in names}
