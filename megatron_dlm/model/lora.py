"""Low-rank adapters beside tensor-parallel linear layers: y = W x + (alpha / r) B (A x).

The layers of a model are `Adaptable`: megatron-core's with a place for an `Adapter`, `AdaptableColumn` and
`AdaptableRow` here, those of Transformer Engine in model/te.py. Without one they are what they were; parameters and
checkpoints know them by the same names either way.

    column (linear_qkv, linear_fc1)   W is cut along its outputs.   A is whole on every rank, B is cut as W is.
    row (linear_proj, linear_fc2)     W is cut along its inputs.    A is cut as W is, B is whole on every rank.

What tensor-parallel ranks exchange besides what the layer does is A x, which is r wide: under sequence parallelism the
factor that is whole sees the tokens of its rank only, so A x is gathered (column) or scattered (row), and the whole
factor's gradient is summed over the ranks by megatron-core, as that of a norm; otherwise it sees all tokens, and A x
is summed in backward (column) or forward (row).

B begins with zeros, so a new adapter changes nothing. A is drawn by key: by the seed, the number of the layer and the
element's place in the whole matrix, so it is the same in every layout.

Invariants (tests/model/test_lora.py, tests/parallel/test_lora.py): values, and gradients of A and B, are those of a
model whose weights are W + (alpha / r) B A, in every layout.

Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.diffusion.keys import stream, uniforms

OF_ADAPTERS = ".lora."  # in the names of their parameters, and in no others


class Adapter(nn.Module):
    """The two factors beside one layer. `a`: [r, inputs or inputs / TP]; `b`: [outputs or outputs / TP, r].

    Args:
        layer: that it stands beside. gated: whether its outputs are [gate; up], each of which is cut.
        draw: a stream of draws (diffusion/keys.py), the same on all ranks.
    """

    def __init__(self, layer: Adaptable, lora: LoraConfig, gated: bool, draw: int) -> None:
        super().__init__()
        self.column, self.gated, self.scale = layer.column, gated, lora.scale
        self.group, self.sequence_parallel = layer.tp_group, layer.sequence_parallel
        weight, rank = layer.weight, lora.lora_rank
        outputs, inputs = weight.shape
        first = 0 if self.column else self.group.rank() * inputs
        whole = inputs if self.column else inputs * self.group.size()
        self.a = nn.Parameter(_drawn(draw, rank, first, inputs, whole).to(weight))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=weight.dtype, device=weight.device))
        cut, whole = (self.b, self.a) if self.column else (self.a, self.b)
        stride = 2 if gated else 1
        set_tensor_model_parallel_attributes(cut, True, 0 if self.column else 1, stride if self.column else 1)
        set_tensor_model_parallel_attributes(whole, False, -1, 1)
        whole.sequence_parallel = self.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """What the layer's input [T, 1, inputs] gives: added to its output of the same shape."""
        narrow = F.linear(hidden, self.a)
        if self.column and self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=self.group)
        elif self.column:
            narrow = copy_to_tensor_model_parallel_region(narrow, self.group)
        elif self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, self.group)
        return F.linear(narrow * self.scale, self.b)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """This rank's part of W + (alpha / r) B A, in the type of `weight`; computed in fp32 or better."""
        return merge(weight, self.a, self.b, self.scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Where the factors stand in those of the whole model, as megatron-core's layers say it of theirs."""
        content = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            prefix,
            {"b": 0} if self.column else {"a": 1},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:
            content[f"{prefix}b"] = apply_swiglu_sharded_factory(content[f"{prefix}b"], sharded_offsets)
        return content


class Adaptable:
    """A layer with a place for an adapter. `column`: whether its outputs are cut, and not its inputs."""

    lora: Adapter | None
    column: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return (output if self.lora is None else output + self.lora(input_)), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        content = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.lora is not None:  # the layer does not know how these are cut
            content |= self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)
        return content


class AdaptableColumn(Adaptable, ColumnParallelLinear):
    """A linear layer whose outputs are cut."""

    column = True


class AdaptableRow(Adaptable, RowParallelLinear):
    """A linear layer whose inputs are cut."""

    column = False


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A in the type of `weight`, computed in fp32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)


def attach(model: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Give the layers of one pipeline chunk that `lora` names new adapters, which change nothing yet."""
    for block in model.modules():
        if not isinstance(block, BaseTransformerLayer):
            continue
        for name, layer in block.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(layer, Adaptable) and last in lora.lora_target_modules:
                draw = stream(seed, "lora", block.layer_number, name)
                gated = last == "linear_fc1" and block.config.gated_linear_unit
                layer.lora = Adapter(layer, lora, gated, draw)


def detach(model: nn.Module) -> None:
    """Take all adapters away again."""
    for _, layer in adapted_layers(model):
        del layer.lora
        layer.lora = None


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Let nothing of a chunk learn but its adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(OF_ADAPTERS in name)
    if model.pre_process and model.config.recompute_granularity is not None:
        # Layers that are computed again pass gradients on only if what they read has one.
        model.embedding.register_forward_hook(
            lambda module, inputs, output: output.requires_grad_() if torch.is_grad_enabled() else output
        )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adaptable]]:
    """The layers of a chunk that have an adapter, with the names of their weights in the chunk."""
    for name, layer in model.named_modules():
        if isinstance(layer, Adaptable) and layer.lora is not None:
            yield f"{name}.weight", layer


@torch.no_grad()
def merge_into_weights(model: nn.Module) -> None:
    """Write W + (alpha / r) B A over the weights of a chunk. Its adapters must go then, or they count twice."""
    for _, layer in adapted_layers(model):
        layer.weight.copy_(layer.lora.merged(layer.weight))


def _drawn(draw: int, rank: int, first: int, columns: int, inputs: int) -> Tensor:
    """Columns [first, first + columns) of a matrix [rank, inputs] of normal numbers with deviation inputs^-1/2, so that
    A x is as large as x. float64, on the CPU.
    """
    row, column = torch.arange(rank)[:, None], torch.arange(first, first + columns)[None, :]
    radius = (-2 * torch.log1p(-uniforms(draw, row, column, torch.tensor(0)))).sqrt()
    return radius * torch.cos(2 * math.pi * uniforms(draw, row, column, torch.tensor(1))) / math.sqrt(inputs)
