"""What releases of megatron-core do differently."""

from __future__ import annotations

import functools

from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_dlm.platform.megatron import submodules_of


def test_parts_of_a_spec_can_be_changed_in_both_forms() -> None:
    """Older releases have a spec where newer ones have a function and its arguments."""
    for made in (functools.partial(ModuleSpec, nn.Identity), functools.partial(functools.partial, dict)):
        parts = ["a norm"]
        spec = made(submodules=parts)
        submodules_of(spec)[0] = "our norm"
        assert parts == ["our norm"] and submodules_of(spec) is parts
