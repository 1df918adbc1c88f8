"""What every command that touches a model needs, built in one order: tokenizer, resolved model, groups, training state, rollout engine.

A `Session` is built once per process from the sections of the configuration. It decides nothing about learning.
"""
from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dlm import platform
from megatron_dlm.config.checkpoint import CheckpointConfig
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.validate import check_model, check_parallel
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.model.shape import model_shape, resolve, transformer_config
from megatron_dlm.parallel import groups as process_groups
from megatron_dlm.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class Session:
    """Attributes: model: every size filled in. groups: the training layout. vocabulary: what the policy ranges over."""

    model: ModelConfig
    parallel: ParallelConfig
    tokenizer: Tokenizer
    groups: Groups
    vocabulary: Vocabulary

    @classmethod
    def open(cls, model: ModelConfig, parallel: ParallelConfig, tokenizer: TokenizerConfig, seed: int) -> Session:
        """Join the job and read the tokenizer. Collective.

        Raises:
            ConfigError, DataError: a setting that cannot work; found before any process group is made where that is possible.
        """
        if tokenizer.tokenizer_model is None:
            raise ConfigError("--tokenizer-model is not set. Give the folder of a HuggingFace tokenizer.")
        words = Tokenizer(tokenizer.tokenizer_model)
        resolved = resolve(model, words.vocab_size)
        check_model(resolved)
        check_parallel(parallel, resolved, _world_size())
        return cls(resolved, parallel, words, process_groups.initialize(parallel, seed), Vocabulary(words.vocab_size, words.mask_id))

    @property
    def grid(self) -> Grid:
        """The absolute grid of the model's attention blocks."""
        return Grid(self.model.block_size)

    def train_state(self, optimizer: OptimizerConfig | None, train_iters: int):
        """Build the policy's TrainState. Collective."""
        from megatron_dlm.model.block_diffusion import BlockDiffusionModel
        from megatron_dlm.training.state import TrainState

        config = transformer_config(self.model, self.parallel)
        shape = model_shape(self.model)

        def build(pre_process: bool, post_process: bool, vp_stage: int | None) -> BlockDiffusionModel:
            return BlockDiffusionModel(config, shape, self.groups.pg_collection, pre_process, post_process, vp_stage)

        return TrainState.build(build, config, optimizer, self.parallel, self.groups, train_iters)

    def describe(self, state) -> str:
        """One line about the model and its layout."""
        count = sum(parameter.numel() for chunk in state.unwrapped_chunks() for parameter in chunk.parameters())
        groups = self.groups
        return (
            f"{count:,} parameters on this rank; block size {self.model.block_size}; tensor x pipeline x data parallel "
            f"{groups.tp_size} x {groups.pp_size} x {groups.dp_size}; {platform.device()}"
        )

    def restore(self, state, checkpoint: CheckpointConfig) -> dict:
        """Load what --load names, if anything. Returns what was saved beside the weights; empty after a fresh start."""
        if checkpoint.load is None:
            return {}
        from megatron_dlm.checkpoint import distributed

        with_optimizer = not (checkpoint.finetune or checkpoint.no_load_optim) and state.optimizer is not None
        extra = distributed.load(state, checkpoint.load, with_optimizer=with_optimizer)
        if checkpoint.finetune:
            state.iteration = 0
            return {}
        return extra

    def rollout_model(self, state):
        """A model in the rollout layout with the state's weights, and what must run after each update (None where storage is shared)."""
        from megatron_dlm.model.block_diffusion import BlockDiffusionModel
        from megatron_dlm.rollout import refit

        groups = process_groups.rollout_groups(self.groups)
        parallel = dataclasses.replace(self.parallel, pipeline_model_parallel_size=1, sequence_parallel=False)
        shared = self.groups.pp_size == 1
        # Bound storage needs no memory of its own; a refitted model is allocated, but nothing is drawn for it.
        config = transformer_config(self.model, parallel, use_cpu_initialization=shared, perform_initialization=False)
        with platform.cuda_calls_on_cpu(), torch.device("meta" if shared else platform.device()):
            model = BlockDiffusionModel(config, model_shape(self.model), groups.pg_collection)
        model.requires_grad_(False).eval()
        if shared:
            refit.bind(state.module, model)
            return model, groups, None
        transfer = refit.Refit(state, model, groups)
        transfer.run()
        return model, groups, transfer


def _world_size() -> int:
    """Processes of this job, known before they meet."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
