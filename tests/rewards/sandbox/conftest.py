"""Sandboxes for tests, at the strongest level of this host."""

from __future__ import annotations

import os

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.rewards.sandbox import isolation
from megatron_dlm.rewards.sandbox.runner import Sandbox
from megatron_dlm.rewards.sandbox.watch import Limits

LIMITS = Limits(cpu=0.4, memory=256 << 20, processes=8, output=64 << 10)


def level_here() -> str | None:
    try:
        return isolation.choose(os.environ.get("MEGATRON_DLM_TEST_ISOLATION", "auto"))
    except ConfigError:
        return None


@pytest.fixture(scope="session")
def level():
    found = level_here()
    if found is None:
        pytest.skip("this host offers no isolation; test_isolation.py asserts the refusal")
    return found


@pytest.fixture(scope="session")
def sandbox(level):
    with Sandbox(level, LIMITS) as sandbox:
        yield sandbox
