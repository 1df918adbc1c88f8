"""Decoding under full attention, written the slow way.

One text, plain lists, one pass per denoising step. The canvas is the prompt and the longest response, all masks at
first; it is filled block by block, counted from the first response token. Everything sees everything that a pass shows:

  - the first step of a block shows the whole canvas;
  - later steps show it up to the end of the window, `horizon` positions behind the block. With a prefix cache what
    stands before the window keeps the keys and values that the block's first step gave it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.rollout.request import Request
from tests.rollout.naive import Naive, Text


def generate(model, request: Request) -> Naive:
    sampling, prompt = request.sampling, [int(token) for token in request.prompt_ids]
    first, shift = len(prompt), model.logit_shift
    limit = first + sampling.max_new_tokens
    text = Text(prompt, request)
    text.tokens += [None] * sampling.max_new_tokens
    for start in range(first, limit, sampling.block_size):
        end = min(start + sampling.block_size, limit)
        window_end = limit if sampling.horizon is None else min(end + sampling.horizon, limit)
        for round_ in range(sampling.denoising_steps):
            masked = text.masked(start, end)
            if not masked:
                break
            if round_ == 0:
                memory: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
                logits = forward(model, text.shown(), 0, limit, masked, memory)
            elif sampling.prefix_cache:
                logits = forward(model, text.shown(), start - shift, window_end, masked, dict(memory))
            else:
                logits = forward(model, text.shown(), 0, window_end, masked, {})
            text.unmask(masked, logits, round_)
        response_end, reason = text.end_in(start, end, limit)
        if reason is not None:
            return text.outcome(response_end, end, reason)
    raise AssertionError("the last block ends the response")


@torch.no_grad()
def forward(
    model, shown: Tensor, start: int, end: int, masked: list[int], memory: dict[tuple[int, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """Logits of the positions `masked` [N, padded vocabulary] when the model computes positions start to end.

    Args:
        shown: int64, the canvas.
        memory: (layer, position) -> key and value, each [kv heads, d]. Positions before `start` are read from it, those
            that are computed are written.
    """
    from megatron_dlm.model.row_params import RowParams

    where = platform.device()
    slots = torch.tensor([position - model.logit_shift - start for position in masked])
    params = RowParams(
        position=torch.arange(start, end).to(where),
        slots=slots.to(where),
        attention=RememberingAttention(start, memory),
    )
    return model.forward_tokens(shown[start:end].to(where), params).cpu()


class RememberingAttention:
    """Every query sees the remembered positions before `start`, and all positions of this pass."""

    def __init__(self, start: int, memory: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> None:
        self.start, self.memory = start, memory

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, _, heads, width = q.shape
        end, sharing = self.start + tokens, heads // k.shape[2]
        for offset in range(tokens):
            self.memory[layer, self.start + offset] = (k[offset, 0].clone(), v[offset, 0].clone())
        seen = [self.memory[layer, position] for position in range(end)]
        outputs = []
        for head in range(heads):
            keys = torch.stack([key[head // sharing] for key, _ in seen])
            values = torch.stack([value[head // sharing] for _, value in seen])
            for offset in range(tokens):
                weights = torch.softmax(keys @ q[offset, 0, head] * scale, dim=0)
                outputs.append(weights @ values)
        return torch.stack(outputs).view(heads, tokens, width).transpose(0, 1).reshape(tokens, 1, heads * width)
