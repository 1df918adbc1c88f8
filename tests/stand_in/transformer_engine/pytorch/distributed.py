"""Activations that are computed again, and a tracker of random states that nobody uses here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as again

from .fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}

    def reset(self) -> None:
        self.states_ = {}


def activation_recompute_forward(*_: Any, **__: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def checkpoint(
    function: Callable, *args: Any, distribute_saved_activations: bool, get_rng_state_tracker: Any, tp_group: Any
) -> Any:
    """What was in an FP8 context is computed again in one."""
    state = FP8GlobalStateManager
    enabled, recipe = state.enabled, state.recipe

    def run(*given: Any) -> Any:
        with fp8_autocast(enabled, recipe):
            return function(*given)

    return again(run, *args, use_reentrant=False)
