"""What every command that touches a model needs, built in one order: tokenizer, resolved model, groups, training state.

A `Session` is built once per process from the sections of the configuration. It decides nothing about learning.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch.distributed as dist

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.tokenizer import TokenizerConfig
from megatron_dlm.config.validate import check_model, check_parallel
from megatron_dlm.config.validate_training import check_trained
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.diffusion.context import Sharing
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import row_multiple
from megatron_dlm.model.attention_backends import check_attention, dtype_of
from megatron_dlm.model.block_diffusion import BlockDiffusionModel
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.model.self_test import attention_pairs, head_pairs
from megatron_dlm.model.shape import model_shape, refused_overrides, resolve, transformer_config
from megatron_dlm.model.value import ValueModel
from megatron_dlm.parallel import groups as process_groups
from megatron_dlm.parallel import self_test
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.platform import te
from megatron_dlm.platform.kernels import by_triton
from megatron_dlm.training.optimizer import whose
from megatron_dlm.training.state import TrainState


@dataclass(frozen=True, slots=True)
class Session:
    """Attributes:
    model: every size filled in. groups: the training layout. vocabulary: what the policy ranges over.
    attention, fused_head: the attention backend of rows, and whether the loss head has kernels, where they have been
        tried out; None before.
    """

    model: ModelConfig
    parallel: ParallelConfig
    tokenizer: Tokenizer
    groups: Groups
    vocabulary: Vocabulary
    attention: str | None = None
    fused_head: bool | None = None

    @classmethod
    def open(cls, model: ModelConfig, parallel: ParallelConfig, tokenizer: TokenizerConfig, seed: int) -> Session:
        """Join the job and read the tokenizer. Collective.

        Raises:
            ConfigError, DataError: a setting that cannot work; found before any process group is made where that is
                possible.
        """
        if tokenizer.tokenizer_model is None:
            raise ConfigError("--tokenizer-model is not set. Give the folder of a tokenizer, or --load a checkpoint.")
        prefix = getattr(tokenizer, "response_prefix", None)  # no field of commands that read token ids only
        words = Tokenizer(tokenizer.tokenizer_model, tokenizer.mask_token_id, prefix)
        if words.mask_id == model.vocab_size:  # the weights have no row for a mask that the tokenizer was given
            model = dataclasses.replace(model, vocab_size=words.vocab_size)
        resolved = resolve(model, words.vocab_size)
        check_model(resolved)
        check_parallel(parallel, resolved, _world_size())
        check_attention(parallel, resolved)
        by_triton("--loss-head", parallel.loss_head)  # which says what is missing
        te.require(parallel)
        session = cls(
            resolved,
            parallel,
            words,
            process_groups.initialize(parallel, seed),
            Vocabulary(words.vocab_size, words.mask_id),
        )
        attention, fused_head = session._kernels()
        return dataclasses.replace(session, attention=attention, fused_head=fused_head)

    @property
    def grid(self) -> Grid:
        """The absolute grid of the model's attention blocks; one block under full attention."""
        return Grid(self.model.block_size)

    @property
    def row_multiple(self) -> int:
        """Lengths of rows are multiples of this."""
        attention = self.attention or check_attention(self.parallel, self.model)
        return row_multiple(self.groups.tp_size, self.parallel.token_multiple, attention)

    @property
    def rows_multiple(self) -> int:
        """Numbers of rows of an update on a rank are multiples of this: interleaved stages take turns in rounds."""
        return 1 if self.parallel.num_virtual_stages_per_pipeline_rank is None else self.groups.pp_size

    @property
    def sharing(self) -> Sharing:
        """How rows are shared under context parallelism."""
        groups, model = self.groups, self.model
        return Sharing(
            groups.cp_size,
            groups.cp_rank,
            model.block_size,
            self.row_multiple,
            self.tokenizer.pad_id,
            model.logit_shift,
        )

    def train_state(
        self, optimizer: OptimizerConfig | None, train_iters: int, lora: LoraConfig | None = None, seed: int = 0
    ) -> TrainState:
        """Build the policy's TrainState. Without an optimizer its parameters are frozen and it has no gradients.
        Collective.

        Args:
            lora: where it asks for adapters, they alone are trained. seed: that they are drawn by.

        Raises: as `value_state`.
        """
        return self._state(BlockDiffusionModel, optimizer, train_iters, lora, seed)

    def value_state(self, optimizer: OptimizerConfig | None, train_iters: int) -> TrainState:
        """Build the TrainState of a value model for this policy, in the same groups, with random weights below a head
        of zeros. Collective.

        Raises:
            ConfigError: --fp64 with an optimizer, which keeps its master weights in fp32; or overrides that
                megatron-core cannot follow here.
        """
        return self._state(ValueModel, optimizer, train_iters)

    def _state(
        self,
        kind: type[BlockDiffusionModel],
        optimizer: OptimizerConfig | None,
        train_iters: int,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> TrainState:
        if optimizer is not None:
            check_trained(self.model, optimizer, self.parallel)
        config = transformer_config(self.model, self.parallel)
        shape = model_shape(self.model)
        attention, fused_head = self._kernels()

        def build(pre_process: bool, post_process: bool, vp_stage: int | None) -> BlockDiffusionModel:
            try:
                model = kind(config, shape, self.groups.pg_collection, pre_process, post_process, vp_stage)
            except (AssertionError, ImportError, RuntimeError, ValueError) as error:  # it may need a package, or CUDA
                if not self.model.transformer_overrides or "memory" in str(error):
                    raise
                raise refused_overrides(self.model, error) from error
            model.attention_backend, model.fused_head = attention, fused_head
            model.requires_grad_(optimizer is not None)
            if lora is not None and lora.wanted:
                model.adapt(lora, seed)
            return model

        return TrainState.build(build, config, optimizer, self.parallel, self.groups, train_iters)

    def _kernels(self) -> tuple[str, bool]:
        """The attention backend of a model, and whether its loss head has kernels: tried out on a GPU. Collective.

        Raises:
            DependencyError: one that was asked for by name does not work on some rank.
        """
        if self.attention is not None and self.fused_head is not None:
            return self.attention, self.fused_head
        model, parallel, device = self.model, self.parallel, platform.device()
        dtype, tensor = dtype_of(model), self.groups.tp_size
        attention = check_attention(parallel, model)
        fused_head = by_triton("--loss-head", parallel.loss_head)
        if attention == "flex" and self_test.needed():
            shape = model.num_attention_heads // tensor, max(1, model.num_query_groups // tensor), model.kv_channels
            work = lambda: attention_pairs(*shape, dtype, device)
            if not self_test.passed("--attention-backend", parallel.attention_backend, "dense", dtype, work, *shape):
                attention = "dense"
        if fused_head and self_test.needed():
            work = lambda: head_pairs(dtype, device)
            fused_head = self_test.passed("--loss-head", parallel.loss_head, "torch", dtype, work)
        return attention, fused_head

    def describe(self, state: TrainState) -> str:
        """One line about the model and its layout."""
        sizes = [(parameter.numel(), parameter.requires_grad) for _, parameter in state.named_parameters()]
        count, learn = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
        adapters = f", {learn:,} of them in adapters that learn" if 0 < learn < count else ""
        groups = self.groups
        context = f", context parallel {groups.cp_size}" if groups.cp_size > 1 else ""
        updated = f"; {whose(state.optimizer)}" if state.optimizer is not None else ""
        backend = state.unwrapped_chunks()[0].attention_backend
        attention = "full attention" if self.model.full_attention else f"block size {self.model.block_size}"
        return (
            f"{count:,} parameters on this rank{adapters}; {attention}; tensor x pipeline x data parallel "
            f"{groups.tp_size} x {groups.pp_size} x {groups.data_size}{context}; {self._layers()}, "
            f"{backend} attention{updated}; {platform.device()}"
        )

    def _layers(self) -> str:
        """Whose layers these are, and what they compute in."""
        parallel = self.parallel
        if parallel.transformer_impl == "local":
            reason = te.hidden()
            return "plain layers" + (f" (Transformer Engine cannot be imported: {reason})" if reason else "")
        if parallel.fp8_format is None:
            return "layers of Transformer Engine"
        return f"layers of Transformer Engine in FP8 ({parallel.fp8_format}, {parallel.fp8_recipe})"


def _world_size() -> int:
    """Processes of this job, known before they meet."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
