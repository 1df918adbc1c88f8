"""The model: megatron-core's GPTModel, read at target slots.

Three things differ from a causal GPT, and all of them come with the row: the positions, who sees whom, and where the
head is evaluated. Layers, tensor, sequence and pipeline parallelism, checkpoint names and gradient hooks are
megatron-core's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.diffusion.rows import Row
from megatron_dlm.model.attention import LayoutAttention
from megatron_dlm.model.attention_backends import attention_of, served
from megatron_dlm.model.lora import AdaptableColumn, AdaptableRow, attach, freeze_all_but_adapters
from megatron_dlm.model.norm import RMSNorm
from megatron_dlm.model.rotary import RotaryByPosition
from megatron_dlm.model.row_params import Attention, RowParams
from megatron_dlm.model.shape import ModelShape, rotary_width
from megatron_dlm.platform.megatron import submodules_of


def layer_spec(config: TransformerConfig, with_experts: bool) -> ModuleSpec:
    """One transformer layer: megatron-core's local spec with our attention and norm, and linear layers that can have
    adapters (model/lora.py); or its spec of Transformer Engine's parts (model/te.py)."""
    if config.transformer_impl == "transformer_engine":
        from megatron_dlm.model.te import te_layer_spec

        return te_layer_spec(config, with_experts)
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if with_experts else None,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    attention.submodules.core_attention = LayoutAttention
    attention.submodules.linear_qkv, attention.submodules.linear_proj = AdaptableColumn, AdaptableRow
    if not with_experts:
        mlp = submodules_of(layer.mlp)
        mlp.linear_fc1, mlp.linear_fc2 = AdaptableColumn, AdaptableRow
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    return spec


def layer_specs(config: TransformerConfig, first: int, count: int) -> list[ModuleSpec]:
    """The specs of `count` layers from layer `first` on, counted from 0 over the whole model: with experts where
    `moe_layer_freq` says so (a list with an entry per layer; a number n stands for every n-th layer).
    """
    frequency = config.moe_layer_freq
    layers = range(first, first + count)
    wanted = [bool(frequency[i]) if isinstance(frequency, list) else i % frequency == 0 for i in layers]
    if config.num_moe_experts is None:
        wanted = [False] * count
    spec = {with_experts: layer_spec(config, with_experts) for with_experts in set(wanted)}
    return [spec[with_experts] for with_experts in wanted]


class BlockDiffusionModel(GPTModel):
    """One pipeline chunk of a block-diffusion transformer.

    Args:
        config: megatron-core's configuration, owned by this model.
        shape: sizes that TransformerConfig has no field for.
        pg_collection: process groups of this model.
        pre_process, post_process, vp_stage: which end of the pipeline this chunk is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        stage = torch.distributed.get_rank(pg_collection.pp)
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=layer_specs(config, first, layers), layer_norm=RMSNorm
            ),
            vocab_size=shape.padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.logit_shift = shape.logit_shift
        self.adapters: LoraConfig | None = None  # those that it was given to learn (`adapt`)
        self.attention_backend = "auto"  # a value of --attention-backend
        self.fused_head = False  # whether the loss is computed by Triton's kernels (model/head.py)
        wide = config.params_dtype == torch.float64
        self.rotary_pos_emb = RotaryByPosition(
            rotary_width(config.kv_channels, shape.rotary_percent),
            shape.rotary_base,
            torch.float64 if wide else torch.float32,
        )

    def adapt(self, lora: LoraConfig, seed: int) -> None:
        """Let adapters alone learn, from now on. They change nothing yet."""
        attach(self, lora, seed)
        freeze_all_but_adapters(self)
        self.adapters = lora

    def forward_row(self, row: Row, headless: bool = False) -> Tensor:
        """Run this chunk over a packed row; the last stage returns the logits of the row's targets, [N, V / TP], or
        with `headless` the hidden states that its head would read, [N, h].

        The model is read where it predicts a target (`Row.read_slots`).
        """
        slots = row.read_slots(self.logit_shift) if self.post_process else row.targets.slot
        params = RowParams(
            position=row.layout.position, slots=slots, attention=self.attention_of(row), headless=headless
        )
        return self.forward_tokens(row.tokens, params)

    def attention_of(self, row: Row) -> Attention:
        """Who sees whom in a row. Made once for all virtual stages of a process."""
        stages, backend = self.config.virtual_pipeline_model_parallel_size, self.backend_of_rows(row.tokens.device)
        more_to_come = self.vp_stage is not None and stages is not None and self.vp_stage < stages - 1
        return attention_of(row, self.pg_collection.cp, backend, more_to_come)

    def backend_of_rows(self, device: torch.device) -> str:
        """What computes attention over rows on a device: a value of --attention-backend that is not `auto`."""
        return served(self.attention_backend, self.config.params_dtype, self.config.kv_channels, device)

    def forward_tokens(self, tokens: Tensor, params: RowParams) -> Tensor:
        """Run this chunk over tokens [T] that see each other as `params` says; the head is evaluated at its slots,
        whatever the model's logit shift.
        """
        return self(tokens[None], None, None, packed_seq_params=params)

    def _postprocess(self, hidden_states: Tensor, *_: object, packed_seq_params: RowParams, **__: object) -> Tensor:
        """Logits at the slots only: over all noisy copies of a text, each token passes the head once."""
        if not self.post_process:
            return hidden_states
        hidden = self.hidden_at_slots(hidden_states, packed_seq_params.slots)
        return hidden if packed_seq_params.headless else self.head(hidden)

    def hidden_at_slots(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """Final hidden states [T or T / TP, 1, h] -> [N, h] at the slots, equal on all tensor-parallel ranks."""
        if self.config.sequence_parallel:
            # The selected states are the same on every rank, and so are their gradients: backward takes this rank's
            # part, it must not sum.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden[:, 0].index_select(0, slots)

    def head(self, hidden: Tensor) -> Tensor:
        """[N, h] -> logits [N, V / TP]."""
        return F.linear(copy_to_tensor_model_parallel_region(hidden, self.pg_collection.tp), self.head_weight())

    def head_weight(self) -> Tensor:
        """Weight of the head, [V / TP, h], up to date.

        With `overlap_param_gather` new weights arrive while earlier layers run, and who needs one waits for it in a
        hook before the forward pass of its module. The output layer's is never called, so its hooks are called here.
        """
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
