"""What holds for all files of tests: long ones come first, and no pool of processes outlives its file."""

from __future__ import annotations

import gc
import os
import sys

import pytest
import torch

# Kernels in Triton run in its interpreter where there is no GPU; triton looks at this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Where most of the time goes. With several processes (tests/run.sh) each takes the next file when it has done with one:
# a long one at the end would be waited for by the others.
LONGEST_FIRST = (
    "tests/benchmarks/",
    "tests/bad_inputs/",
    "tests/multinode/",
    "tests/examples/",
    "tests/curriculum/",
    "tests/checkpoint/",
    "tests/parallel/",
    "tests/test_",
    "tests/training/",
    "tests/rollout/",
    "tests/rl/",
    "tests/rewards/",
    "tests/evaluation/",
    "tests/model/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((n for n, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start)), len(LONGEST_FIRST))

    items.sort(key=place)  # within one place in the order in which they came


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if (nextitem is None or nextitem.path != item.path) and "tests.harness" in sys.modules:
        sys.modules["tests.harness"].close_pools()


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: garbage collections need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries look for what nobody has let go of
