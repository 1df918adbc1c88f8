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
from torch import Tensor

from megatron_dlm.diffusion.rows import Row
from megatron_dlm.model.attention import DenseAttention, LayoutAttention
from megatron_dlm.model.norm import RMSNorm
from megatron_dlm.model.rotary import RotaryByPosition
from megatron_dlm.model.row_params import RowParams
from megatron_dlm.model.shape import ModelShape


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One transformer layer: megatron-core's local spec with our attention and norm."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    attention.submodules.core_attention = LayoutAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    return spec


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
        layers = get_num_layers_to_build(
            config, vp_stage=vp_stage, pp_rank=torch.distributed.get_rank(pg_collection.pp)
        )
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(config)] * layers, layer_norm=RMSNorm
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
        wide = config.params_dtype == torch.float64
        self.rotary_pos_emb = RotaryByPosition(
            config.kv_channels, shape.rotary_base, torch.float64 if wide else torch.float32
        )

    def forward_row(self, row: Row) -> Tensor:
        """Run this chunk over a packed row; the last stage returns logits at the row's target slots, [N, V / TP]."""
        params = RowParams(position=row.layout.position, slots=row.targets.slot, attention=DenseAttention(row.layout))
        return self.forward_tokens(row.tokens, params)

    def forward_tokens(self, tokens: Tensor, params: RowParams) -> Tensor:
        """Run this chunk over tokens [T] that see each other as `params` says."""
        return self(tokens[None], None, None, packed_seq_params=params)

    def _postprocess(self, hidden_states: Tensor, *_: object, packed_seq_params: RowParams, **__: object) -> Tensor:
        """Logits at the slots only: over all noisy copies of a text, each token passes the head once."""
        if not self.post_process:
            return hidden_states
        return self.head(self.hidden_at_slots(hidden_states, packed_seq_params.slots))

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
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return F.linear(copy_to_tensor_model_parallel_region(hidden, self.pg_collection.tp), weight)
