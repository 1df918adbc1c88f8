"""The state of all running sequences, as one table of tensors on the device.

One line per slot, one column per position; a denoising round reads and writes all running sequences with a handful of
tensor operations and no loop over sequences. What the host must know after a round is one small tensor, `advance`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.diffusion.sampling import Confidence, DrawRules
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.unmasking import Remasking, UnmaskRules, scheduled_count
from megatron_dlm.rollout.plan import Sequence
from megatron_dlm.rollout.request import Request

_TABLES = {"step": torch.int64, "version": torch.int64, "logprob": torch.float64, "sampling_logprob": torch.float64}


class Progress(IntEnum):
    """What became of a sequence's block in a round."""

    SAME_BLOCK = 0
    NEXT_BLOCK = 1
    STOP = 2
    LENGTH = 3


class RunningBatch:
    """Slots of running sequences, and behind them one line of nobody (`spare`), for places of a round that stay empty.

    Attributes (S lines, L positions):
        tokens: int64 [S, L]; the mask token where unknown.
        known: bool [S, L].
        step: int64 [S, L], denoising step at which a position was unmasked, 0 for the prompt.
        logprob, sampling_logprob: float64 [S, L].
        version: int64 [S, L], of the weights.
        prompt_length, limit: int64 [S]; `limit` is one past the last position of the longest response.
        start, block_end: int64 [S], the block being denoised. text_end: int64 [S], as in `Sequence`.
        steps_taken, block_steps, forwards: int64 [S], denoising steps of the response, of this block, and model passes.
        stops: int64 [S, K], stop tokens; -1 where there are fewer than K.
        and, per slot, the sampling parameters.
    """

    def __init__(self, num_slots: int, max_length: int, mask_id: int, device: torch.device) -> None:
        self.mask_id, self.max_length, self.device, self.spare = mask_id, max_length, device, num_slots
        table = (num_slots + 1, max_length)
        self.tokens = torch.full(table, mask_id, dtype=torch.int64, device=device)
        self.known = torch.zeros(table, dtype=torch.bool, device=device)
        for name, dtype in _TABLES.items():
            setattr(self, name, torch.zeros(table, dtype=dtype, device=device))
        counters = "prompt_length limit start block_end text_end steps_taken block_steps forwards"
        settings = "block_size denoising_steps remasking confidence top_k stream"
        for name in f"{counters} {settings}".split():
            setattr(self, name, torch.zeros(num_slots + 1, dtype=torch.int64, device=device))
        for name in ("temperature", "top_p", "threshold", "entropy_bound"):
            setattr(self, name, torch.ones(num_slots + 1, dtype=torch.float64, device=device))
        self.block_size[num_slots] = self.denoising_steps[num_slots] = 1
        self.greedy = torch.zeros(num_slots + 1, dtype=torch.bool, device=device)
        self.stops = torch.full((num_slots + 1, 1), -1, dtype=torch.int64, device=device)
        self.widest_block = 1
        self.filters = False  # whether a running sequence may have top-k or top-p, as far as the host knows

    # Sequences that come and go -------------------------------------------------------------------------------------

    def admit(self, sequences: Ordered[Sequence]) -> None:
        """Write the lines of sequences that start."""
        if not sequences:
            return
        slots, requests = [one.slot for one in sequences], [one.request for one in sequences]
        slot = torch.tensor(slots, device=self.device)
        lines = {name: np.zeros((len(slots), self.max_length), _numpy(dtype)) for name, dtype in _TABLES.items()}
        tokens = np.full((len(slots), self.max_length), self.mask_id, np.int64)
        known = np.zeros(tokens.shape, bool)
        for line, request in enumerate(requests):
            prompt, end = len(request.prompt_ids), len(request.prompt_ids) + request.num_done
            tokens[line, :prompt] = request.prompt_ids
            known[line, :end] = True
            if request.partial is not None:
                partial = request.partial
                tokens[line, prompt:end] = partial.response_ids
                lines["step"][line, prompt:end] = partial.steps
                lines["version"][line, prompt:end] = partial.weight_versions
                lines["logprob"][line, prompt:end] = partial.logprobs
                lines["sampling_logprob"][line, prompt:end] = partial.sampling_logprobs
        for name, values in {"tokens": tokens, "known": known, **lines}.items():
            getattr(self, name)[slot] = torch.from_numpy(values).to(self.device)
        columns: dict[str, list] = {}
        for one in sequences:
            for name, value in {**_progress(one), **_settings(one.request)}.items():
                columns.setdefault(name, []).append(value)
        for name, values in columns.items():
            column = getattr(self, name)
            column[slot] = torch.tensor(values, dtype=column.dtype, device=self.device)
        self._set_stops(slot, [_stops(request.sampling) for request in requests])
        self.widest_block = max(self.widest_block, *(request.sampling.block_size for request in requests))
        self.filters |= any(_filters(request.sampling) for request in requests)

    def forget_filters(self, running: Iterable[Sequence]) -> None:
        """Of sequences that do not run any more."""
        self.filters = self.filters and any(_filters(one.request.sampling) for one in running)

    def _set_stops(self, slot: Tensor, stops: list[tuple[int, ...]]) -> None:
        width = max(map(len, stops))
        if width > self.stops.shape[1]:
            more = self.stops.new_full((len(self.stops), width - self.stops.shape[1]), -1)
            self.stops = torch.cat([self.stops, more], dim=1)
        width = self.stops.shape[1]
        self.stops[slot] = torch.tensor([[*row, *[-1] * (width - len(row))] for row in stops], device=self.device)

    def restart_block(self, slots: list[int]) -> None:
        """Mask again what the current block of these slots has unmasked, as if it had not begun."""
        if not slots:
            return
        slot = torch.tensor(slots, device=self.device)
        position, inside = self._current_block(slot)
        fresh = inside & (self.step[slot[:, None], position] > 0)
        line, column = torch.nonzero(fresh, as_tuple=True)
        where = slot[line], position[line, column]
        self.tokens[where] = self.mask_id
        self.known[where] = False
        self.step[where] = 0
        for counter in (self.steps_taken, self.forwards):
            counter[slot] -= self.block_steps[slot]
        self.block_steps[slot] = 0

    # One round ------------------------------------------------------------------------------------------------------

    def draw_rules(self, slot: Tensor | slice) -> DrawRules:
        """For each of N positions, in these slots [N]."""
        return DrawRules(
            greedy=self.greedy[slot],
            top_k=self.top_k[slot],
            top_p=self.top_p[slot],
            temperature=self.temperature[slot],
            confidence=self.confidence[slot],
        )

    def unmask_rules(self, slot: Tensor) -> UnmaskRules:
        """For the current blocks of these slots [n]."""
        taken, allowed = self.block_steps[slot], self.denoising_steps[slot]
        return UnmaskRules(
            remasking=self.remasking[slot],
            count=scheduled_count(self.block_size[slot], allowed, taken),
            threshold=self.threshold[slot],
            entropy_bound=self.entropy_bound[slot],
            last_step=taken + 1 >= allowed,
        )

    def advance(self, slot: Tensor, stepped: Tensor | None = None) -> Tensor:
        """Count a denoising step of these slots [n]; go on to the next block where one is finished.

        Args:
            stepped: bool [n], which of them took one; None is all.

        Returns: int64 [n, 2]: `Progress`, and where it is STOP or LENGTH one past the last token of the response.
        """
        for counter in (self.steps_taken, self.block_steps, self.forwards):
            counter[slot] += 1 if stepped is None else stepped
        position, inside = self._current_block(slot)
        tokens = self.tokens[slot[:, None], position]
        done = (self.known[slot[:, None], position] | ~inside).all(1)
        if stepped is not None:
            done &= stepped
        limit, block_end = self.limit[slot], self.block_end[slot]
        response = inside & (position >= self.prompt_length[slot][:, None]) & (position < limit[:, None])
        is_stop = (tokens[:, :, None] == self.stops[slot][:, None]).any(-1) & response
        stopped, at_limit = is_stop.any(1), block_end >= limit
        first_stop = self.start[slot] + is_stop.to(torch.int8).argmax(1)
        progress = torch.where(at_limit, Progress.LENGTH.value, Progress.NEXT_BLOCK.value)
        progress = torch.where(stopped, Progress.STOP.value, progress)
        progress = torch.where(done, progress, Progress.SAME_BLOCK.value)
        going_on = progress == Progress.NEXT_BLOCK
        self.start[slot] = torch.where(going_on, block_end, self.start[slot])
        next_end = torch.minimum(block_end + self.block_size[slot], self.text_end[slot])
        self.block_end[slot] = torch.where(going_on, next_end, block_end)
        self.block_steps[slot] = torch.where(going_on, 0, self.block_steps[slot])
        return torch.stack([progress, torch.where(stopped, first_stop + 1, limit)], dim=1)

    def _current_block(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the current blocks [n, B], and which of them are inside: shorter blocks are filled up."""
        position = self.start[slot][:, None] + torch.arange(self.widest_block, device=self.device)
        return position.clamp(max=self.max_length - 1), position < self.block_end[slot][:, None]

    # Records --------------------------------------------------------------------------------------------------------

    def traces(self, sequences: Ordered[Sequence], ends: Ordered[int], reasons: Ordered[str]) -> list[Trace]:
        """The records of sequences whose responses end before the positions `ends`. All but an aborted one have a
        complete terminal block; that of an aborted one is dropped.
        """
        slot = torch.tensor([one.slot for one in sequences], device=self.device)
        read = lambda name: getattr(self, name)[slot].cpu().numpy()
        table = {name: read(name) for name in ("tokens", *_TABLES)}
        forwards = read("forwards").tolist()
        traces = []
        for line, (one, end, reason) in enumerate(zip(sequences, ends, reasons, strict=True)):
            request, prompt = one.request, len(one.request.prompt_ids)
            response = slice(prompt, end)
            tail = slice(end, end if reason == "abort" else max(end, one.block_end))
            column = lambda name, where, line=line: table[name][line, where].copy()
            traces.append(
                Trace(
                    prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
                    response_ids=column("tokens", response),
                    tail_ids=column("tokens", tail),
                    steps=column("step", response),
                    tail_steps=column("step", tail),
                    logprobs=column("logprob", response),
                    sampling_logprobs=column("sampling_logprob", response),
                    weight_versions=column("version", response),
                    sampling=request.sampling,
                    prompt_key=request.prompt_key,
                    sample=request.sample,
                    finish_reason=reason,
                    num_forwards=forwards[line],
                )
            )
        return traces


def _numpy(dtype: torch.dtype) -> type:
    return np.float64 if dtype == torch.float64 else np.int64


def _filters(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _stops(sampling: SamplingParams) -> tuple[int, ...]:
    return () if sampling.ignore_eos else tuple(sampling.stop_token_ids)


def _progress(sequence: Sequence) -> dict[str, int]:
    request, partial = sequence.request, sequence.request.partial
    prompt = len(request.prompt_ids)
    return dict(
        prompt_length=prompt,
        limit=prompt + request.sampling.max_new_tokens,
        start=sequence.start,
        block_end=sequence.block_end,
        text_end=sequence.text_end,
        steps_taken=0 if partial is None else int(partial.steps.max(initial=0)),
        forwards=0 if partial is None else partial.num_forwards,
        block_steps=0,
    )


def _settings(request: Request) -> dict[str, float]:
    sampling = request.sampling
    return dict(
        stream=request.stream,
        greedy=sampling.temperature == 0,
        block_size=sampling.block_size,
        denoising_steps=sampling.denoising_steps,
        remasking=int(Remasking[sampling.remasking.upper()]),
        confidence=int(Confidence[sampling.ranked_by.upper()]),
        temperature=sampling.policy_temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        threshold=sampling.threshold,
        entropy_bound=sampling.entropy_bound,
    )
