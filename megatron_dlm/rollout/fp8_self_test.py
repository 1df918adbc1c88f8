"""Rounding and a product of FP8, tried out before an engine keeps its weights so (parallel/self_test.py).

What rounds activations is one kernel where there is Triton. Where that does not do what torch does, torch's operations
round, and the product is tried with what they give: it has nothing to fall back to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.model.fp8 import Rounding, quantise_rows, rounding, scaled_product
from megatron_dlm.parallel import self_test

_TOKENS, _OUTPUTS = 37, 144
_WIDTH = 4096  # as of a model's layers: what a sum loses grows with it


def working_rounding() -> Rounding:
    """What rounds activations on this device. On a GPU collective over the job.

    Raises:
        DependencyError: the GPU, or that of another rank, does not multiply what is rounded.
    """
    by = rounding()
    if self_test.needed():
        flag, choice, dtype, device = "--rollout-weights", "fp8", torch.bfloat16, platform.device()
        # Also where it is torch's already: another rank may have the kernel, and all are asked.
        words = f"Rounding for {flag} {choice}:"
        if not self_test.passed(words, "auto", "torch", dtype, lambda: rounding_pairs(by, device)):
            by = quantise_rows
        self_test.passed(flag, choice, "trained", dtype, lambda: product_pairs(by, device))
    return by


def rounding_pairs(by: Rounding, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Activations rounded `by`, and by torch."""
    x, _ = _drawn(device)
    for name, mine, right in zip(("numbers", "scales"), by(x), quantise_rows(x)):
        yield f"rounded activations' {name}", mine, right


def product_pairs(by: Rounding, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A product of activations that are rounded `by`, and that of the dequantised numbers, in float64."""
    x, weight = _drawn(device)
    x, weight = by(x), quantise_rows(weight)
    wide = [data.double() * scale.double() for data, scale in (x, weight)]
    yield "a product in FP8", scaled_product(*x, *weight, torch.bfloat16), wide[0] @ wide[1].t()


def _drawn(device: torch.device) -> list[Tensor]:
    """Activations and a weight, with rows of different sizes."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows: torch.randn(rows, _WIDTH, generator=generator) * torch.rand(rows, 1, generator=generator)
    return [draw(rows).to(device, torch.bfloat16) for rows in (_TOKENS, _OUTPUTS)]
