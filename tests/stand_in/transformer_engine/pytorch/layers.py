"""Norms, linear layers and groups of these, cut over tensor-parallel ranks.

Collectives are megatron-core's, which in the real package are Transformer Engine's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fp8 import FP8GlobalStateManager
from .tensor import QuantizedTensor


class _Read(torch.autograd.Function):
    """A copy of a weight, whose gradients are the weight's."""

    @staticmethod
    def forward(_: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Module(nn.Module):
    """What all products share. `ran`: of each pass, whether in FP8, and under what recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[bool, str]] = []
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False
        self._fp8_workspaces: dict[str, Tensor] = {}
        self.save_original_input = False

    def multiplied(self, tokens: Tensor, is_first_microbatch: bool | None, **weights: Tensor) -> list[Tensor]:
        """Note a product of these tokens, and return the weights that it reads, for which gradients are meant: in an
        FP8 context copies, which are made when the caller says that weights are new, and used until then.
        """
        state = FP8GlobalStateManager
        self.note(tokens, *weights.values())
        if not state.enabled:
            return list(weights.values())
        copies = self._fp8_workspaces if is_first_microbatch is not None else {}
        for name, weight in weights.items():
            if not isinstance(weight, QuantizedTensor) and (is_first_microbatch or name not in copies):
                copies[name] = weight.detach().clone()
        return [_Read.apply(weight, copies[name]) if name in copies else weight for name, weight in weights.items()]

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Histories of largest numbers where a recipe has them: the step under way, then the oldest to the newest. An
        expert has three columns, and two of gradients.
        """
        recipe = FP8GlobalStateManager.recipe
        if FP8GlobalStateManager.enabled and hasattr(recipe, "amax_history_len") and "scaling_fwd" not in self.fp8_meta:
            for way, columns in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
                history = torch.zeros(recipe.amax_history_len, columns)
                self.fp8_meta[way] = SimpleNamespace(scale=torch.ones(columns), amax_history=history)

    def note(self, tokens: Tensor, *weights: Tensor, expert: int = 0) -> None:
        state = FP8GlobalStateManager
        self.fp8 = state.enabled
        self.init_fp8_metadata(getattr(self, "num_gemms", 1))
        for way, columns in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            meta = self.fp8_meta.get(way)
            if meta is None:
                continue
            meta.amax_history.copy_(meta.amax_history.roll(-1, 0))
            meta.amax_history[0, columns * expert] = columns * tokens.detach().abs().max() if tokens.numel() else 0.0
            meta.scale.copy_(448.0 / meta.amax_history.amax(0).clamp(min=1e-3))
        self.ran.append((state.enabled, type(state.recipe).__name__ if state.enabled else ""))
        if not state.enabled:
            return
        for tensor in (tokens, *weights):
            if math.prod(tensor.shape[:-1]) % 8 or tensor.shape[-1] % 16:
                raise ValueError(f"FP8 products do not take {tuple(tensor.shape)}")
        if math.prod(tokens.shape[:-1]) % 16:  # tokens are what the weight's gradient sums over
            raise ValueError(f"FP8 products do not take the gradients of {tuple(tokens.shape)}")

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None: ...


def _mark(weight: Tensor, dim: int) -> None:
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1


def _weight(rows: int, columns: int, init_method: Callable, dtype: torch.dtype, tracker: Callable | None, name: str):
    weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))
    with tracker().fork(name) if tracker is not None else torch.no_grad(), torch.no_grad():
        init_method(weight)
    if not FP8GlobalStateManager.keeps_weights:
        return weight
    kept = nn.Parameter(QuantizedTensor.of(weight.detach()))
    exact = [weight.detach()]
    kept.get_high_precision_init_val, kept.clear_high_precision_init_val = lambda: exact[0], exact.clear
    return kept


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        *,
        eps: float,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: Any,
        hidden_size: int | None = None,  # what callers named the shape before release 2
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return _normed(hidden, self.weight, self.eps)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None: ...


class LayerNorm(nn.Module): ...


class DotProductAttention(nn.Module): ...


def _normed(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype) * weight


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features = out_features // tp_size
        elif parallel_mode == "row":
            self.in_features = in_features // tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1 and parallel_mode is not None
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.use_bias, self.return_bias = bias, return_bias
        name = rng_tracker_name or "model-parallel-rng"
        self.weight = _weight(
            self.out_features, self.in_features, init_method, params_dtype, get_rng_state_tracker, name
        )
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype))
            if parallel_mode == "column":
                _mark(self.bias, 0)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        out = self.product(inp, is_first_microbatch)
        if not self.use_bias:
            return out
        return (out, self.bias) if self.return_bias else out + self.bias

    def product(self, inp: Tensor, is_first_microbatch: bool | None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        # Its own tokens are what a rank puts into FP8, before it gathers others'
        (weight,) = self.multiplied(inp, is_first_microbatch, weight=self.weight)
        if self.parallel_mode == "column" and self.sequence_parallel:
            inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
        elif self.parallel_mode == "column":
            inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        out = F.linear(inp, weight)
        if self.parallel_mode == "row" and self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        if self.parallel_mode == "row":
            return mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float,
        normalization: str,
        zero_centered_gamma: bool,
        return_layernorm_output: bool,
        params_dtype: torch.dtype,
        sequence_parallel: bool,
        **rest: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, params_dtype=params_dtype, sequence_parallel=sequence_parallel, **rest
        )
        if normalization != "RMSNorm" or zero_centered_gamma:
            raise NotImplementedError
        self.eps, self.return_layernorm_output = eps, return_layernorm_output
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_weight.sequence_parallel = sequence_parallel

    def product(self, inp: Tensor, is_first_microbatch: bool | None) -> Tensor:
        return super().product(_normed(inp, self.layer_norm_weight, self.eps), is_first_microbatch)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, ...]:
        """With the norm's output of this rank's own tokens, unrounded, behind the rest, if that is wanted."""
        found = super().forward(inp, is_first_microbatch)
        if not self.return_layernorm_output:
            return found
        normed = _normed(inp, self.layer_norm_weight, self.eps)
        return (*found, normed) if isinstance(found, tuple) else (found, normed)


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Callable | None,
        init_method: Callable,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        ub_name: str,
        rng_tracker_name: str,
    ) -> None:
        super().__init__()
        if bias or tp_size > 1:
            raise NotImplementedError
        self.num_gemms, self.use_bias = num_gemms, bias
        self._num_fp8_tensors_per_gemm = {"fwd": 3, "bwd": 2}
        for number in range(num_gemms):
            weight = _weight(
                out_features, in_features, init_method, params_dtype, get_rng_state_tracker, rng_tracker_name
            )
            _mark(weight, 1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{number}", weight)

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        named = {f"weight{number}": getattr(self, f"weight{number}") for number in range(self.num_gemms)}
        parts = inp.split(m_splits)
        for expert, part in enumerate(parts):
            self.note(part, *named.values(), expert=expert)
        weights = self.multiplied(inp, is_first_microbatch, **named)
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights)])


class Fp8Padding(nn.Module):
    """Fills the tokens of each expert up to a multiple of 16."""

    def __init__(self, num_gemms: int, align_size: None = None) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        wanted = [-(-size // 16) * 16 for size in m_splits]
        parts = [F.pad(part, (0, 0, 0, size - len(part))) for part, size in zip(inp.split(m_splits), wanted)]
        return torch.cat(parts), wanted


class Fp8Unpadding(nn.Module):
    def __init__(self, num_gemms: int, align_size: None = None) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        padded = [-(-size // 16) * 16 for size in m_splits]
        return torch.cat([part[:size] for part, size in zip(inp.split(padded), m_splits)])
