"""All sections of the settings: the name that a section has in a YAML file, and its dataclass.

A command names the sections that it reads (`pick`), or, where it would leave fields of one unread, the part of it that
it does read (`PARTS`). Two sections may share a field name only if no command reads both, as `sft` and
`rl` do.
"""

from __future__ import annotations

from megatron_dlm.config.checkpoint import CheckpointConfig, LoadConfig
from megatron_dlm.config.curriculum import CurriculumConfig
from megatron_dlm.config.eval import EvalConfig, TrainingEvalConfig
from megatron_dlm.config.generate import GenerateConfig
from megatron_dlm.config.log import LoggingConfig, ReportConfig
from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import LayoutConfig, ParallelConfig, RowsConfig
from megatron_dlm.config.plan import PlanConfig
from megatron_dlm.config.preprocess import PreprocessConfig
from megatron_dlm.config.profile import ProfileConfig, TrainingProfileConfig
from megatron_dlm.config.reward import JudgeConfig, RewardConfig
from megatron_dlm.config.rl import RLConfig
from megatron_dlm.config.rollout import EngineConfig, RolloutConfig
from megatron_dlm.config.run import RunConfig, TrainingRunConfig
from megatron_dlm.config.score import ScoreConfig
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.trace import TraceConfig
from megatron_dlm.config.value import ValueConfig

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "profile": TrainingProfileConfig,
    "tokenizer": TokenizerConfig,
    "sft": SFTConfig,
    "rollout": RolloutConfig,
    "rl": RLConfig,
    "curriculum": CurriculumConfig,
    "value": ValueConfig,
    "reward": RewardConfig,
    "eval": TrainingEvalConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "trace": TraceConfig,
    "run": TrainingRunConfig,
    "plan": PlanConfig,
    "preprocess": PreprocessConfig,
}

PARTS: dict[str, type] = {
    "parallel": LayoutConfig,
    "checkpoint": LoadConfig,
    "logging": ReportConfig,
    "profile": ProfileConfig,
    "rollout": EngineConfig,
    "reward": JudgeConfig,
    "eval": EvalConfig,
    "run": RunConfig,
}
"""What a command reads that does not train."""


def pick(*names: str) -> dict[str, type]:
    """The sections that a command reads, in the order of its --help."""
    return {name: SECTIONS[name] for name in names}


def pick_parts(*names: str) -> dict[str, type]:
    """The same for a command that does not train."""
    return {name: PARTS.get(name, SECTIONS[name]) for name in names}


def pick_for_rows(*names: str) -> dict[str, type]:
    """The same for a command that does not train, but goes over packed rows as trainers do."""
    return {name: RowsConfig if name == "parallel" else part for name, part in pick_parts(*names).items()}
