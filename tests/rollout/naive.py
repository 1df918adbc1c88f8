"""The engine written the slow way.

One sequence, no cache, a full forward pass for every denoising step, and Python loops for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.rollout.request import Request
from tests.diffusion.oracles import MASK_ID
from tests.tiny import allowed_logprobs, explicit_logits


@dataclass
class Naive:
    """What a response should be."""

    response: list[int]
    tail: list[int]
    steps: list[int]
    tail_steps: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    reason: str
    forwards: int
    states: list = field(default_factory=list)


def generate(model, request: Request) -> Naive:
    sampling, prompt = request.sampling, [int(token) for token in request.prompt_ids]
    block, first, temperature = sampling.block_size, len(prompt), sampling.temperature or 1.0
    tokens, step_of, logprob_of, sampled_of = list(prompt), {}, {}, {}
    start, steps = first // block * block, 0
    while True:
        tokens += [None] * (start + block - len(tokens))
        for round_ in range(sampling.denoising_steps):
            masked = [position for position in range(start, start + block) if tokens[position] is None]
            if not masked:
                break
            policy = _policy(model, tokens, masked, block, temperature)
            drawn = {}
            for row, position in enumerate(masked):
                u = float(uniforms(request.stream, torch.tensor([position]), torch.tensor([steps]))[0])
                drawn[position] = _draw(policy[row].tolist(), policy[row].exp().tolist(), u, sampling)
            steps += 1
            for position in _unmask(masked, drawn, sampling, round_, block):
                tokens[position], logprob_of[position], sampled_of[position], _ = drawn[position]
                step_of[position] = steps
        limit, end = first + sampling.max_new_tokens, None
        for position in range(max(start, first), min(start + block, limit)):
            if tokens[position] in sampling.stop_token_ids and not sampling.ignore_eos:
                end, reason = position + 1, "stop"
                break
        if end is None and start + block >= limit:
            end, reason = limit, "length"
        start += block
        if end is not None:
            inside, after = range(first, end), range(end, start)
            return Naive(
                [tokens[p] for p in inside],
                [tokens[p] for p in after],
                [step_of[p] for p in inside],
                [step_of[p] for p in after],
                [logprob_of[p] for p in inside],
                [sampled_of[p] for p in inside],
                reason,
                steps,
            )


@torch.no_grad()
def _policy(model, tokens: list, masked: list[int], block: int, temperature: float) -> torch.Tensor:
    shown = torch.tensor([MASK_ID if token is None else token for token in tokens])
    position = torch.arange(len(tokens))
    blocks = position // block
    logits = explicit_logits(model, shown, position, blocks[None, :] <= blocks[:, None], torch.tensor(masked))
    return allowed_logprobs(logits, temperature).cpu()


def _draw(logprob: list[float], probability: list[float], u: float, sampling) -> tuple[int, float, float, float]:
    """(token, log-probability under the policy, under what was drawn from, confidence)."""
    if sampling.temperature == 0:
        token = max(range(len(logprob)), key=lambda one: (logprob[one], -one))
        return token, logprob[token], 0.0, probability[token]
    ranked = sorted(range(len(logprob)), key=lambda one: (-logprob[one], one))
    kept = [one for one in ranked[: sampling.top_k or None] if probability[one] > 0]
    total, nucleus = sum(probability[one] for one in kept), []
    for one in kept:
        if sampling.top_p < 1 and sum(probability[other] for other in nucleus) / total >= sampling.top_p:
            break
        nucleus.append(one)
    total = sum(probability[one] for one in nucleus)
    passed = 0.0
    for token in sorted(nucleus):
        passed += probability[token] / total
        if u < passed:
            break
    sampled = probability[token] / total
    return token, logprob[token], float(torch.tensor(sampled, dtype=torch.float64).log()), sampled


def _unmask(masked: list[int], drawn: dict, sampling, round_: int, block: int) -> list[int]:
    if round_ == sampling.denoising_steps - 1:
        return masked
    count = block // sampling.denoising_steps + (1 if round_ < block % sampling.denoising_steps else 0)
    if sampling.remasking == "sequential":
        return masked[:count]
    surest = sorted(masked, key=lambda position: (-drawn[position][3], position))[:count]
    if sampling.remasking == "dynamic":
        surest += [
            position for position in masked if drawn[position][3] > sampling.threshold and position not in surest
        ]
    return surest
