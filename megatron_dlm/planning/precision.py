"""What trained layers are made of and multiply in, and the bytes of a matrix in FP8, recipe by recipe.

Read in Transformer Engine 2.9 (pytorch/module, pytorch/tensor) and megatron-core 0.16.1; not measured on a GPU:

  - a weight that is kept in bfloat16 has a copy in FP8 beside it from the first row of an update on, which the next
    update overwrites: by rows for the forward product, and for the backward one by columns, too;
  - of the input of a product only what the gradient of the weight reads stays, one byte a number;
  - numbers that share one scale (delayed, tensorwise) have one fp32 number a matrix; copies by columns of them are
    needed only where a GPU multiplies no other layout (Hopper; Blackwell does);
  - blockwise: an fp32 scale for each 128 x 128 of a weight and each 128 numbers of an input; mxfp8: a byte for each 32.
    Tables of scales are filled up to what the products read.

Invariants (tests/planning/test_precision.py): bytes are those that are written out for one small shape a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.parallel import PrecisionConfig, fp8_tokens


@dataclass(frozen=True, slots=True)
class Precision:
    """How the layers compute. What is outside of them (embedding, heads), and attention, is in bfloat16 whatever it is.

    Attributes:
        fused: layers of Transformer Engine. recipe: of FP8; None multiplies in the type of the weights.
        gather: weights are kept in FP8 (--fp8-param-gather). start, end: layers at the ends that stay in bfloat16.
        transposed: matrices of one scale are kept transposed, too, because the GPU multiplies no other layout.
    """

    fused: bool = False
    recipe: str | None = None
    gather: bool = False
    start: int = 0
    end: int = 0
    transposed: bool = True

    @classmethod
    def of(cls, parallel: PrecisionConfig, transposed: bool = True) -> Precision:
        fused = parallel.transformer_impl == "transformer_engine"
        if not fused or parallel.fp8_format is None:
            return cls(fused)
        ends = (parallel.num_layers_at_start_in_bf16, parallel.num_layers_at_end_in_bf16)
        start, end = ends if parallel.first_last_layers_bf16 else (0, 0)
        return cls(fused, parallel.fp8_recipe, parallel.fp8_param_gather, start, end, transposed)

    @property
    def token_multiple(self) -> int:
        """Tokens that a rank has of a row are a multiple of this."""
        return 1 if self.recipe is None else fp8_tokens("hybrid", self.recipe)

    def in_fp8(self, layer: int, layers: int) -> bool:
        """Whether a layer, counted from 0 over the whole model, multiplies in FP8."""
        return self.recipe is not None and self.start <= layer < layers - self.end

    def share(self, layers: int) -> float:
        """Of the layers of a model, how many multiply in FP8."""
        return sum(self.in_fp8(layer, layers) for layer in range(layers)) / layers

    def weight_bytes(self, outputs: int, inputs: int, backward: bool = True) -> int:
        """A weight [outputs, inputs] in FP8 with its scales. backward: of a model that learns."""
        size = outputs * inputs
        if self.recipe in ("delayed", "tensorwise"):
            return size * (2 if backward and self.transposed else 1) + 4
        if self.recipe == "blockwise":
            high, wide = -(-outputs // 128), -(-inputs // 128)
            by_rows, by_columns = 4 * high * _filled(wide, 4), 4 * wide * _filled(high, 4)
        else:
            by_rows = _filled(outputs, 128) * _filled(inputs // 32, 4)
            by_columns = _filled(outputs // 32, 4) * _filled(inputs, 128)
        return size + by_rows + (size + by_columns if backward else 0)

    def input_bytes(self, tokens: int, width: int) -> int:
        """What is kept of a product's input [tokens, width] for the backward pass, in FP8 with its scales."""
        size = tokens * width
        if self.recipe == "blockwise":
            return size + 4 * -(-tokens // 128) * _filled(width, 4)
        if self.recipe == "mxfp8":
            return size + _filled(-(-tokens // 32), 4) * _filled(width, 128)
        return size + 4


BF16 = Precision()
"""megatron-core's plain layers."""


def _filled(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
