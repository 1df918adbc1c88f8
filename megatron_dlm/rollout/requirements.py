"""What an engine needs of the device that it runs on, looked at before anything is built."""

from __future__ import annotations

import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import DependencyError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.platform.kernels import by_triton
from megatron_dlm.rollout.attention.backends import served
from megatron_dlm.rollout.kv_cache import CacheShape

OLDEST_WITH_FP8 = (8, 9)  # compute capability


def check_engine_here(engine: EngineConfig, model: ModelConfig) -> None:
    """Refuse a sampler, weights in FP8, or an attention backend that cannot run on this process's device.

    Args:
        model: resolved.

    Raises:
        ConfigError, DependencyError: one of them cannot.
    """
    if engine.rollout_backend == "native":
        by_triton("--rollout-sampler", engine.rollout_sampler)
        if engine.rollout_weights == "fp8":
            check_fp8()
        dtype = torch.bfloat16 if model.bf16 else torch.float64 if model.fp64 else torch.float32
        # The number of heads on a rank plays no part.
        served(
            engine.rollout_attention_backend,
            CacheShape(model.num_layers, engine.kv_page_size, 1, model.kv_channels, dtype),
            platform.device(),
        )


def check_fp8() -> None:
    """Refuse a GPU that multiplies no numbers of FP8.

    Raises:
        DependencyError: it is one.
    """
    if platform.is_cuda() and (found := torch.cuda.get_device_capability(platform.device())) < OLDEST_WITH_FP8:
        needed, there = (".".join(map(str, one)) for one in (OLDEST_WITH_FP8, found))
        raise DependencyError(
            f"--rollout-weights fp8 needs a GPU of compute capability {needed} or more, and this one has {there}. "
            "Use --rollout-weights trained."
        )
