from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_dlm import platform

platform.install()
cpu_only = pytest.mark.skipif(platform.is_cuda(), reason="the stand-in is for hosts without CUDA")


def test_device_and_backend_agree() -> None:
    assert (platform.device().type, platform.backend()) in {("cpu", "gloo"), ("cuda", "nccl")}


@cpu_only
def test_install_twice_changes_nothing_more() -> None:
    before = torch.cuda.current_device
    platform.install()
    assert torch.cuda.current_device is before
    assert not torch.cuda.is_available()


@cpu_only
def test_cuda_means_cpu_only_inside() -> None:
    with platform.cuda_calls_on_cpu():
        for tensor in (
            torch.zeros(2, device="cuda"),
            torch.ones(1).to("cuda"),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
        ):
            assert tensor.device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


@cpu_only
def test_streams_and_events_are_always_done() -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        event.record(stream)
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(event)
    assert event.query() and stream.query()
    assert not torch.cuda.is_current_stream_capturing()


@cpu_only
def test_random_state_is_that_of_the_cpu() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_megatron_core_imports_after_install_in_a_fresh_process() -> None:
    code = (
        "from megatron_dlm import platform; platform.install(); "
        "import megatron.core.models.gpt; import torch; torch.compile"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
