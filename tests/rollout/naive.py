"""The engine written the slow way.

One sequence, no cache, a full forward pass for every denoising step, and Python loops for everything else.
"""

from __future__ import annotations

import math
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
    margins: list[float] = field(
        default_factory=list
    )  # per denoising step: what would have to change for another outcome


def generate(model, request: Request) -> Naive:
    sampling, prompt = request.sampling, [int(token) for token in request.prompt_ids]
    block, first = sampling.block_size, len(prompt)
    text = Text(prompt, request)
    start = first // block * block
    while True:
        text.tokens += [None] * (start + block - len(text.tokens))
        for round_ in range(sampling.denoising_steps):
            masked = text.masked(start, start + block)
            if not masked:
                break
            text.unmask(masked, _logits(model, text.shown(), masked, block), round_)
        end, reason = text.end_in(start, start + block, first + sampling.max_new_tokens)
        start += block
        if reason is not None:
            return text.outcome(end, start, reason)


class Text:
    """A text that grows: tokens, None where masked, and what is known about each position that was unmasked."""

    def __init__(self, prompt: list[int], request: Request) -> None:
        self.prompt, self.request, self.sampling = len(prompt), request, request.sampling
        self.tokens: list[int | None] = list(prompt)
        self.step_of, self.logprob_of, self.sampled_of = {}, {}, {}
        self.steps = 0
        self.margins: list[float] = []

    def masked(self, start: int, end: int) -> list[int]:
        return [position for position in range(start, end) if self.tokens[position] is None]

    def shown(self) -> torch.Tensor:
        """What the model is given, int64."""
        return torch.tensor([MASK_ID if token is None else token for token in self.tokens])

    def unmask(self, masked: list[int], logits: torch.Tensor, round_: int) -> None:
        """One denoising step, the `round_`-th of its block. Args: logits: [len(masked), padded vocabulary]."""
        drawn, margins = {}, []
        for row, position in enumerate(masked):
            u = float(uniforms(self.request.stream, torch.tensor([position]), torch.tensor([self.steps]))[0])
            drawn[position] = _draw(logits[row : row + 1], u, self.sampling)
            margins.append(_margin_of_draw(logits[row : row + 1], u, self.sampling))
        self.steps += 1
        self.margins.append(min(*margins, _margin_of_choice(drawn, self.sampling, round_)))
        for position in _unmask(masked, drawn, self.sampling, round_):
            self.tokens[position], self.logprob_of[position], self.sampled_of[position], _ = drawn[position]
            self.step_of[position] = self.steps

    def end_in(self, start: int, end: int, limit: int) -> tuple[int, str | None]:
        """Where the response ends if it ends in this block, and why; the reason is None where it does not."""
        for position in range(max(start, self.prompt), min(end, limit)):
            if self.tokens[position] in self.sampling.stop_token_ids and not self.sampling.ignore_eos:
                return position + 1, "stop"
        return (limit, "length") if end >= limit else (end, None)

    def outcome(self, end: int, block_end: int, reason: str) -> Naive:
        inside, after = range(self.prompt, end), range(end, block_end)
        return Naive(
            [self.tokens[p] for p in inside],
            [self.tokens[p] for p in after],
            [self.step_of[p] for p in inside],
            [self.step_of[p] for p in after],
            [self.logprob_of[p] for p in inside],
            [self.sampled_of[p] for p in inside],
            reason,
            self.steps,
            self.margins,
        )


@torch.no_grad()
def _logits(model, shown: torch.Tensor, masked: list[int], block: int) -> torch.Tensor:
    position = torch.arange(len(shown))
    blocks = position // block
    slots = torch.tensor(masked) - model.logit_shift
    return explicit_logits(model, shown, position, blocks[None, :] <= blocks[:, None], slots).cpu()


def _draw(logits: torch.Tensor, u: float, sampling) -> tuple[int, float, float, float]:
    """(token, log-probability under the policy, under what was drawn from, confidence). Args: logits: [1, padded]."""
    (logprob,) = allowed_logprobs(logits, sampling.temperature or 1.0).tolist()
    policy = [math.exp(one) for one in logprob]
    (untempered,) = allowed_logprobs(logits).exp().tolist()
    if sampling.temperature == 0:
        token = max(range(len(logprob)), key=lambda one: (logprob[one], -one))
        return token, logprob[token], 0.0, _confidence(token, policy, untempered, sampling)
    ranked = sorted(range(len(logprob)), key=lambda one: (-logprob[one], one))
    kept = [one for one in ranked[: sampling.top_k or None] if policy[one] > 0]
    total, nucleus = sum(policy[one] for one in kept), []
    for one in kept:
        if sampling.top_p < 1 and sum(policy[other] for other in nucleus) / total >= sampling.top_p:
            break
        nucleus.append(one)
    total = sum(policy[one] for one in nucleus)
    shaped = [policy[one] / total if one in nucleus else 0.0 for one in range(len(policy))]
    passed = 0.0
    for token in sorted(nucleus):
        passed += shaped[token]
        if u < passed:
            break
    return token, logprob[token], math.log(shaped[token]), _confidence(token, shaped, untempered, sampling)


def _margin_of_draw(logits: torch.Tensor, u: float, sampling) -> float:
    """Probability that would have to move for another token; of plain sampling and of greedy decoding only."""
    policy = allowed_logprobs(logits, sampling.temperature or 1.0)[0].exp()
    if sampling.temperature == 0:
        best, second = policy.topk(2).values.tolist()
        return best - second
    return float((policy.double().cumsum(0) - u).abs().min())


def _margin_of_choice(drawn: dict, sampling, round_: int) -> float:
    """Confidence that would have to move for other positions, under the static and the dynamic policy."""
    confidence = sorted((one[3] for one in drawn.values()), reverse=True)
    count = sampling.block_size // sampling.denoising_steps + (round_ < sampling.block_size % sampling.denoising_steps)
    gaps = [confidence[count - 1] - confidence[count]] if count < len(confidence) else []
    if sampling.remasking == "dynamic":
        gaps += [abs(one - sampling.threshold) for one in confidence]
    return min(gaps, default=math.inf)


def _confidence(token: int, drawn_from: list[float], untempered: list[float], sampling) -> float:
    if sampling.remasking == "entropy_bounded" or sampling.confidence == "entropy":
        return sum(one * math.log(one) for one in drawn_from if one > 0)
    if sampling.confidence == "margin":
        best, second = sorted(drawn_from)[:-3:-1]
        return best - second
    return untempered[token] if sampling.confidence == "untempered" else drawn_from[token]


def _unmask(masked: list[int], drawn: dict, sampling, round_: int) -> list[int]:
    if round_ == sampling.denoising_steps - 1:
        return masked
    block, steps = sampling.block_size, sampling.denoising_steps
    count = block // steps + (1 if round_ < block % steps else 0)
    if sampling.remasking == "sequential":
        return masked[:count]
    surest = sorted(masked, key=lambda position: (-drawn[position][3], position))
    if sampling.remasking == "entropy_bounded":
        entropy = lambda n: -sum(drawn[position][3] for position in surest[:n])
        return surest[: max((n for n in range(1, len(surest) + 1) if entropy(n) < sampling.entropy_bound), default=1)]
    if sampling.remasking == "dynamic":
        return surest[:count] + [position for position in surest[count:] if drawn[position][3] > sampling.threshold]
    return surest[:count]
