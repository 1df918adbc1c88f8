"""What only a GPU runs, against what is known to be right: FlexAttention in training, Triton kernels, products in FP8,
layers of Transformer Engine. benchmarks/gpu_check.py has them beside its own cases.
"""

from __future__ import annotations

import torch

from megatron_dlm import platform

Found = dict[str, "tuple[float, float] | str"]
"""By name: a difference and the largest that is allowed, or why it was not compared."""

_PRODUCT = 2e-2  # of FP8: tensor cores keep fewer digits of a sum than fp32 has
_ATTENTION = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def kernel_cases(dtype: torch.dtype) -> Found:
    """All that there are for a precision. What raises has failed, and leaves the others alone. Destroys the
    model-parallel groups; the default group stays.
    """
    found: Found = {}
    for what, cases in (
        ("attention of training", _attention),
        ("Triton", _kernels),
        ("layers", _layers),
        ("weights in FP8", _weights),
    ):
        try:
            found |= cases(dtype)
        except Exception as error:
            said = " ".join(str(error).split())[:120]
            found[f"{what}: {type(error).__name__}: {said}"] = (float("nan"), 0.0)
    return found


def _attention(dtype: torch.dtype) -> Found:
    from benchmarks.attention import differences

    return {name: (value, _ATTENTION[dtype]) for name, value in differences(dtype).items()}


def _kernels(dtype: torch.dtype) -> Found:
    """Loss head and sampler. Triton's interpreter, which would run them on a CPU, is for tests alone."""
    from benchmarks import kernels
    from megatron_dlm.platform.kernels import missing

    if dtype not in kernels.TOLERANCES:
        return {}
    if (why := missing() if platform.is_cuda() else "this host has no GPU") is not None:
        return {"loss head and sampler in Triton": why}
    limit = lambda name: kernels.OTHER_TOKENS if name == "sampler, draws that differ" else kernels.TOLERANCES[dtype]
    return {f"Triton: {name}": (value, limit(name)) for name, value in kernels.differences(dtype).items()}


def _weights(dtype: torch.dtype) -> Found:
    """What rounding and multiplication make of weights in FP8, against the dequantised numbers in float64."""
    from megatron_dlm.model.fp8 import rounding
    from megatron_dlm.parallel.self_test import relative_difference
    from megatron_dlm.rollout.fp8_self_test import product_pairs, rounding_pairs
    from megatron_dlm.rollout.requirements import OLDEST_WITH_FP8

    if dtype != torch.bfloat16:
        return {}
    if platform.is_cuda() and torch.cuda.get_device_capability() < OLDEST_WITH_FP8:
        return {"weights in FP8": "this GPU multiplies no numbers of FP8"}
    pairs = [pair for make in (rounding_pairs, product_pairs) for pair in make(rounding(), platform.device())]
    return {f"weights in FP8: {name}": (relative_difference(mine, right), _PRODUCT) for name, mine, right in pairs}


def _layers(dtype: torch.dtype) -> Found:
    """They compute in bfloat16 or FP8, and need a GPU."""
    from benchmarks import fused_layers
    from megatron_dlm.parallel import groups

    if dtype != torch.bfloat16 or not platform.is_cuda():
        return {}
    groups.destroy(keep_world=True)  # they make their own
    return {
        f"layers by {name}": value if isinstance(value, str) else (value, fused_layers.bound_of(name))
        for name, value in fused_layers.differences().items()
    }
