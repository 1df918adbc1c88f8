"""How much an engine works on at once: from settings and from the memory that is free."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dlm import platform
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.parallel import self_test
from megatron_dlm.parallel.groups import Groups
from megatron_dlm.platform import memory
from megatron_dlm.platform.kernels import by_triton
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.sampler_self_test import sampler_pairs

_TOKENS_PER_PASS = {"cuda": 8192, "cpu": 1024}  # on a CPU the activations of a pass should stay in its cache
_LARGE_PAGE = 256  # larger pages than texts only waste memory, but some kernels want pages of so many tokens
_ROUNDS_PER_SYNC = {"cuda": 4, "cpu": 1}  # on a GPU not measured


def engine_options(
    rollout: EngineConfig,
    groups: Groups,
    longest: int,
    full_attention: bool,
    spoken_for: int = 0,
    dtype: torch.dtype = torch.float32,
) -> EngineOptions:
    """What an engine is built with. Collective over the job; the ranks of a tensor-parallel group take the same
    decisions and therefore have the same number of pages.

    Args:
        groups: the rollout layout.
        longest: longest text in tokens, its terminal block included.
        spoken_for: bytes of the memory that is free now which others will take.
        dtype: of the logits.

    Raises:
        DependencyError: a sampler that was asked for by name does not work here.
    """
    if rollout.kv_cache_gib is not None:
        limit = int(min(rollout.kv_cache_gib * 2**30, memory.available()))
    else:
        limit = int(rollout.kv_cache_memory_fraction * max(0, memory.available() - spoken_for))
    if groups.tp_size > 1:
        least = torch.tensor(limit, device=platform.device())
        dist.all_reduce(least, dist.ReduceOp.MIN, groups.tp)
        limit = int(least)
    return EngineOptions(
        max_running_requests=rollout.max_running_requests,
        max_length=longest,
        max_tokens_per_pass=rollout.max_tokens_per_pass or _TOKENS_PER_PASS[platform.device().type],
        page_size=min(rollout.kv_page_size, max(longest, _LARGE_PAGE)),
        kv_cache_bytes=limit,
        full_attention=full_attention,
        attention_backend=rollout.rollout_attention_backend,
        cuda_graphs=rollout.rollout_cuda_graphs,
        fused_sampler=_fused_sampler(rollout.rollout_sampler, dtype),
        longest_first=rollout.longest_first,
        rounds_per_sync=rollout.rollout_rounds_per_sync or _ROUNDS_PER_SYNC[platform.device().type],
    )


def _fused_sampler(choice: str, dtype: torch.dtype) -> bool:
    """Whether tokens are drawn by kernels, which are tried out on a GPU. Collective over the job."""
    flag = "--rollout-sampler"
    if not by_triton(flag, choice):
        return False
    work = lambda: sampler_pairs(dtype, platform.device())
    return not self_test.needed() or self_test.passed(flag, choice, "torch", dtype, work)
