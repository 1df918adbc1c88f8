"""The value model: the policy's backbone with one number per target instead of a distribution over tokens.

It runs over the rows of the policy and is read where the policy is read: at the slot of a hidden token (with a logit
shift at the token before it). What stands there knows the state in which the token was decided and nothing of the
decision, so a value is a baseline that does not bias the policy's gradient.

The head is a linear map without bias that begins at zero: a new value model expects nothing. It is whole on every
tensor-parallel rank. The hidden states at the slots are whole there too, so is the head's gradient, and nothing is
summed over these ranks (`hidden_at_slots` says how this fits sequence parallelism).

Invariants (tests/model/test_value.py, tests/parallel/test_value.py):
  - values are those of single denoising states under the policy's backbone;
  - values, losses and updates do not depend on the layout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_dlm.model.block_diffusion import BlockDiffusionModel
from megatron_dlm.model.norm import RMSNorm
from megatron_dlm.model.shape import ModelShape

HEAD = "value_head.weight"


class ValueModel(BlockDiffusionModel):
    """One pipeline chunk of a value model; `forward_row` returns the values [N] of a row's targets on the last stage.

    Args: those of `BlockDiffusionModel`.
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
        # A stage in the middle of the pipeline has no output layer, tied or not; what the last one needs is put on top.
        untied = dataclasses.replace(shape, tie_embeddings=False)
        super().__init__(config, untied, pg_collection, pre_process, post_process=False, vp_stage=vp_stage)
        if post_process:
            self.post_process = self.decoder.post_process = True
            self.decoder.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.value_head = nn.Linear(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
            nn.init.zeros_(self.value_head.weight)

    def head(self, hidden: Tensor) -> Tensor:
        """[N, h] -> values [N], in fp32 or better."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.value_head.weight.to(wide))[:, 0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Without what a language model does about its output layer, which is not there."""
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
