"""The state of all running sequences, as one table of tensors.

One line per slot, one column per position; a denoising round reads and writes all running sequences with a handful of
tensor operations and no loop over sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.unmasking import Remasking
from megatron_dlm.rollout.kv_cache import Ragged
from megatron_dlm.rollout.request import Request


class RunningBatch:
    """Slots of running sequences.

    Attributes (S slots, L positions):
        tokens: int64 [S, L]; the mask token where unknown.
        known: bool [S, L].
        step: int64 [S, L], denoising step at which a position was unmasked, 0 for the prompt.
        logprob, sampling_logprob: float64 [S, L].
        version: int64 [S, L], of the weights.
        prompt_length, limit: int64 [S]; `limit` is one past the last position of the longest response.
        start: int64 [S], first position of the block being denoised.
        cached: int64 [S], positions before this have their final keys and values in the cache.
        steps_taken, block_steps, forwards: int64 [S], denoising steps of the response, of this block, and model passes.
        request: the request of each slot, None where it is free.
        and, per slot, the sampling parameters.
    """

    def __init__(self, num_slots: int, max_length: int, mask_id: int, device: torch.device) -> None:
        self.mask_id = mask_id
        self.device = device
        table = (num_slots, max_length)
        self.tokens = torch.full(table, mask_id, dtype=torch.int64, device=device)
        self.known = torch.zeros(table, dtype=torch.bool, device=device)
        self.step, self.version = (torch.zeros(table, dtype=torch.int64, device=device) for _ in range(2))
        self.logprob, self.sampling_logprob = (torch.zeros(table, dtype=torch.float64, device=device) for _ in range(2))
        counters = ("prompt_length", "limit", "start", "cached", "steps_taken", "block_steps", "forwards")
        settings = ("block_size", "denoising_steps", "remasking", "top_k", "stream")
        for name in counters + settings:
            setattr(self, name, torch.zeros(num_slots, dtype=torch.int64, device=device))
        for name in ("temperature", "top_p", "threshold"):
            setattr(self, name, torch.ones(num_slots, dtype=torch.float64, device=device))
        self.greedy = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.request: list[Request | None] = [None] * num_slots
        self.free = list(range(num_slots))[::-1]

    def admit(self, request: Request) -> int:
        """Give a request a free slot; returns the slot."""
        slot, sampling = self.free.pop(), request.sampling
        self.request[slot] = request
        prompt = len(request.prompt_ids)
        self.tokens[slot] = self.mask_id
        self.tokens[slot, :prompt] = torch.from_numpy(np.asarray(request.prompt_ids, dtype=np.int64))
        self.known[slot] = False
        self.known[slot, :prompt] = True
        self.step[slot] = 0
        values = dict(
            prompt_length=prompt,
            limit=prompt + sampling.max_new_tokens,
            start=prompt - prompt % sampling.block_size,
            cached=0,
            steps_taken=0,
            block_steps=0,
            forwards=0,
            stream=request.stream,
            greedy=sampling.temperature == 0,
            **_settings(sampling),
        )
        for name, value in values.items():
            getattr(self, name)[slot] = value
        return slot

    def release(self, slot: int) -> None:
        self.request[slot] = None
        self.free.append(slot)

    def num_queries(self, slot: Tensor) -> Tensor:
        """Tokens that the next pass gives each slot [n]: from the end of the cached prefix to that of the block."""
        return self.start[slot] + self.block_size[slot] - self.cached[slot]

    def ragged(self, slot: Tensor) -> Ragged:
        """The query tokens of the next pass of these slots, int64 [n]."""
        start, count = self.cached[slot], self.num_queries(slot)
        sequence = torch.repeat_interleave(torch.arange(len(slot), device=self.device), count)
        offset = torch.arange(len(sequence), device=self.device) - (count.cumsum(0) - count)[sequence]
        position = start[sequence] + offset
        block_size = self.block_size[slot][sequence]
        last_visible = (position // block_size + 1) * block_size
        return Ragged(slot, count.tolist(), sequence, position, last_visible, (start + count).tolist())

    def trace(self, slot: int, end: int, finish_reason: str) -> Trace:
        """The record of a slot whose response ends before position `end` and whose terminal block is complete."""
        request, prompt = self.request[slot], int(self.prompt_length[slot])
        block_end = int(self.start[slot] + self.block_size[slot])
        response, tail = slice(prompt, end), slice(end, max(end, block_end))
        column = lambda table, where: table[slot, where].cpu().numpy().copy()
        return Trace(
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            response_ids=column(self.tokens, response),
            tail_ids=column(self.tokens, tail),
            steps=column(self.step, response),
            tail_steps=column(self.step, tail),
            logprobs=column(self.logprob, response),
            sampling_logprobs=column(self.sampling_logprob, response),
            weight_versions=column(self.version, response),
            sampling=request.sampling,
            prompt_key=request.prompt_key,
            sample=request.sample,
            finish_reason=finish_reason,
            num_forwards=int(self.forwards[slot]),
        )


def _settings(sampling: SamplingParams) -> dict[str, float]:
    return dict(
        block_size=sampling.block_size,
        denoising_steps=sampling.denoising_steps,
        remasking=int(Remasking[sampling.remasking.upper()]),
        temperature=sampling.policy_temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        threshold=sampling.threshold,
    )
