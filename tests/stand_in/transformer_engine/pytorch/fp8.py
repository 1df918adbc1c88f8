"""Contexts of FP8, and who is in one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class FP8GlobalStateManager:
    enabled = keeps_weights = False
    recipe: Any = None
    groups: list[Any] = []
    """Process groups of all contexts that were entered, for the largest numbers of tensors to be reduced over."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    state = FP8GlobalStateManager
    before = state.enabled, state.recipe
    state.enabled, state.recipe = enabled, fp8_recipe
    state.groups.append(fp8_group)
    try:
        yield
    finally:
        state.enabled, state.recipe = before


@contextlib.contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Within it new weights of products are kept in FP8."""
    state = FP8GlobalStateManager
    before, state.keeps_weights = state.keeps_weights, enabled
    try:
        yield
    finally:
        state.keeps_weights = before
