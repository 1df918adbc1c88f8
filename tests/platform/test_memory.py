from __future__ import annotations

import pytest
import torch

from megatron_dlm import platform

platform.install()

from megatron_dlm.platform import memory  # noqa: E402

cuda_only = pytest.mark.skipif(not platform.is_cuda(), reason="a CPU has no allocator that counts")


def test_a_buffer_in_host_memory_holds_bytes() -> None:
    buffer = memory.host_buffer(5)
    assert (buffer.dtype, tuple(buffer.shape), buffer.device.type) == (torch.uint8, (5,), "cpu")
    assert buffer.is_pinned() == platform.is_cuda()


@pytest.mark.skipif(platform.is_cuda(), reason="for hosts without CUDA")
def test_a_cpu_has_nothing_to_say() -> None:
    memory.restart_peak()
    memory.give_back()
    assert memory.usage() is None


@cuda_only
def test_the_peak_is_that_since_it_was_restarted() -> None:
    memory.restart_peak()
    before = memory.usage()
    torch.empty(2**24, dtype=torch.uint8, device=platform.device())
    after = memory.usage()
    assert after.allocated == before.allocated and after.peak >= before.peak + 2**24
    memory.restart_peak()
    assert memory.usage().peak == after.allocated
