"""A small round by which the sampler's kernels are tried out (parallel/self_test.py): all kinds of confidence and of
remasking, temperatures, greedy positions, top-k and top-p, a vocabulary of several pieces with padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dlm.diffusion.sampling import Confidence
from megatron_dlm.diffusion.unmasking import Remasking
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.rollout.batch import RunningBatch
from megatron_dlm.rollout.denoiser import Denoiser

_SLOTS, _BLOCK, _COLUMNS = 32, 4, 8448
_MASK = 7


def sampler_pairs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a round leaves in the batch, by kernels and by torch's operations; of float64 both are torch's."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(_SLOTS * _BLOCK, _COLUMNS, generator=generator)
    masked = torch.rand(_SLOTS, _BLOCK, generator=generator) < 0.8
    slot = torch.arange(_SLOTS, device=device)
    position = torch.arange(_BLOCK, device=device).repeat(_SLOTS, 1)
    version, batches = torch.ones((), dtype=torch.int64, device=device), []
    for fused in (True, False):
        batch = _batch(device)
        denoiser = Denoiser(batch, Vocabulary(_COLUMNS - 30, _MASK), None, fused)
        rules = denoiser.rules(slot.repeat_interleave(_BLOCK))
        denoiser.step_blocks(logits.to(device, dtype), slot, position, masked.to(device), version, rules)
        batches.append(batch)
    mine, right = batches
    same = (mine.tokens == right.tokens) & (mine.known == right.known) & (mine.step == right.step)
    yield "the share of tokens that are chosen alike", same.double().mean(), torch.ones(())
    for name in ("logprob", "sampling_logprob"):
        yield f"the {name} of tokens", getattr(mine, name)[same], getattr(right, name)[same]


def _batch(device: torch.device) -> RunningBatch:
    batch = RunningBatch(_SLOTS, _BLOCK, _MASK, device)
    number = torch.arange(_SLOTS + 1, device=device)
    batch.block_size[:], batch.denoising_steps[:] = _BLOCK, 1 + number % 3
    batch.confidence[:], batch.remasking[:] = number % len(Confidence), number // len(Confidence) % len(Remasking)
    batch.temperature[:] = torch.linspace(0.6, 1.4, _SLOTS + 1, device=device)
    batch.greedy[:], batch.stream[:] = number % 5 == 0, 1234567 * number
    batch.threshold[:], batch.entropy_bound[:] = 0.3, 3.0
    batch.filters, batch.top_k[:] = True, torch.where(number % 3 == 0, 20, 0)
    batch.top_p[:] = torch.where(number % 4 == 1, 0.9, 1.0)
    return batch
