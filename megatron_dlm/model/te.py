"""One transformer layer of Transformer Engine's parts, as megatron-core wraps them.

Norm and first linear layer of attention and of the feed-forward part are one module each; experts are one grouped
product. Attention is the row's, as in the local layer (model/block_diffusion.py). Norms, rotary positions, attention,
router and heads compute in the type of the parameters; what runs in FP8 are the products with the layers' weights, as
far as megatron-core opens an FP8 context around a layer.

Weights are stored under the names of the local layer and have the same shapes, so a checkpoint of one is a checkpoint
of the other; in memory the fused norms have other names, which `canonical` (rollout/reshard_plan.py) undoes.

Import this module only where Transformer Engine is (platform/te.py).

Invariants (tests/parallel/test_te.py, test_te_fp8.py): values and gradients are those of the local layer with
the same weights; checkpoints, exports and refits of the two are equal.
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_dlm.model.attention import LayoutAttention
from megatron_dlm.model.lora import Adaptable
from megatron_dlm.platform.megatron import submodules_of


class AdaptableNormColumn(Adaptable, TELayerNormColumnParallelLinear):
    """A norm and a linear layer whose outputs are cut. An adapter reads what the norm gives, as the layer's weight
    does; the module returns it only while there is one.
    """

    column = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        self.return_layernorm_output = self.lora is not None
        found = TELayerNormColumnParallelLinear.forward(self, input_)
        if self.lora is None:
            return found
        output, bias, normed = found if self.te_return_bias else (found[0][0], None, found[0][1])
        return output + self.lora(normed), bias


class AdaptableTERow(Adaptable, TERowParallelLinear):
    """A linear layer whose inputs are cut."""

    column = False


class _NothingToSplit:
    """Experts whose scales have no history: Transformer Engine says nothing of them, which no megatron-core before 0.19
    expects.
    """

    def _split_extra_state(self, state: Tensor) -> list[Tensor]:
        return super()._split_extra_state(state) if state.numel() else [state] * self.num_gemms


class GroupedColumn(_NothingToSplit, TEColumnParallelGroupedLinear):
    """The first layer of all experts of a rank; its weights say how they are cut."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        _say_how_cut(self, dim=0, stride=2 if config.gated_linear_unit else 1)


class GroupedRow(_NothingToSplit, TERowParallelGroupedLinear):
    """The last layer of all experts of a rank; its weights say how they are cut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _say_how_cut(self, dim=1, stride=1)


def te_layer_spec(config: TransformerConfig, with_experts: bool) -> ModuleSpec:
    """megatron-core's spec of Transformer Engine with our attention, and linear layers that can have adapters."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if with_experts else None,
        moe_grouped_gemm=with_experts,
        qk_layernorm=config.qk_layernorm,
    )
    layer = spec.submodules
    attention = layer.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    attention.submodules.core_attention = LayoutAttention
    attention.submodules.linear_qkv, attention.submodules.linear_proj = AdaptableNormColumn, AdaptableTERow
    if not with_experts:
        mlp = submodules_of(layer.mlp)
        mlp.linear_fc1, mlp.linear_fc2 = AdaptableNormColumn, AdaptableTERow
    else:
        experts = submodules_of(submodules_of(layer.mlp).experts)
        experts.linear_fc1, experts.linear_fc2 = GroupedColumn, GroupedRow
        # This norm stands alone here, too; it is stored where the others are, as megatron-core's local layer does.
        layer.sharded_state_dict_keys_map = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return spec


def _say_how_cut(layer: nn.Module, dim: int, stride: int) -> None:
    """What Transformer Engine, which is not told that experts are cut, notes of them is that of a first layer."""
    for parameter in layer.parameters():
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, name):
                delattr(parameter, name)
        if parameter.dim() == 2:
            set_tensor_model_parallel_attributes(parameter, True, dim, stride)
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
