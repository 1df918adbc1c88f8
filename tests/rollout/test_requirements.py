"""What an engine needs of its device is refused before one is built."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError, DependencyError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig
from tests.tiny import one_process

one_process()  # megatron-core must not be imported before the platform is ready

from megatron_dlm.rollout.requirements import check_engine_here  # noqa: E402

MODEL = ModelConfig(num_layers=1, kv_channels=64, bf16=True)


def test_attention_that_cannot_work_is_refused() -> None:
    check_engine_here(EngineConfig(), MODEL)
    with pytest.raises(ConfigError, match="FlashInfer runs on GPUs only"):
        check_engine_here(EngineConfig(rollout_attention_backend="flashinfer"), MODEL)
    check_engine_here(EngineConfig(rollout_attention_backend="flashinfer", rollout_backend="sglang"), MODEL)


def test_a_gpu_that_knows_no_fp8_is_refused(monkeypatch) -> None:
    plain = EngineConfig(rollout_attention_backend="sdpa", rollout_sampler="torch")
    fp8 = EngineConfig(rollout_attention_backend="sdpa", rollout_sampler="torch", rollout_weights="fp8")
    check_engine_here(fp8, MODEL)
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setattr(platform, "device", lambda: torch.device("cuda", 0))
    for chip in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, chip=chip: chip)
        check_engine_here(fp8, MODEL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_engine_here(plain, MODEL)
    with pytest.raises(DependencyError, match="8.9 or more, and this one has 8.0"):
        check_engine_here(fp8, MODEL)
