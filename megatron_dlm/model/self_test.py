"""Small passes by which the kernels of training are tried out (parallel/self_test.py): attention, loss head.

They have what a kernel can get wrong: several tiles and texts, noisy copies, padding; a vocabulary of several blocks
with a mask token and padding, temperatures, an entropy. Values and gradients are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dlm.diffusion.layout import CLEAN, PROMPT, Layout
from megatron_dlm.model import attention_backends
from megatron_dlm.model.head import label_policy
from megatron_dlm.model.policy import Vocabulary

_TEXTS = ((200, 150), (3, 90), (70, 6))  # tokens of prompts and of their responses
_BLOCK, _PADDED = 4, 9
_TARGETS, _COLUMNS, _WIDTH = 40, 8448, 64


def attention_pairs(
    heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """FlexAttention of a row, and dense attention.

    Args:
        heads, kv_heads, width: of the model on this rank, because torch compiles a kernel for each of these sizes.
    """
    layout = _layout().to(device)
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(len(layout.group), 1, count, width, generator=generator).to(device, dtype)
    given, weight = [draw(heads), draw(kv_heads), draw(kv_heads)], draw(heads).flatten(2)
    found = []
    for name in ("flex", "dense"):
        leaves = [one.clone().requires_grad_() for one in given]
        out = attention_backends.KINDS[name](layout)(1, *leaves, width**-0.5)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    yield from zip(("its output", *(f"the gradient of {one}" for one in ("queries", "keys", "values"))), *found)


def head_pairs(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The loss head by kernels, and by torch's operations."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    given = draw(_TARGETS, _WIDTH), 0.3 * draw(_COLUMNS, _WIDTH)
    vocabulary = Vocabulary(_COLUMNS - 30, 7)
    labels = torch.randint(8, vocabulary.size, (_TARGETS,), generator=generator).to(device)
    temperature = torch.linspace(0.6, 1.4, _TARGETS, device=device)
    found = []
    for fused in (True, False):
        leaves = [one.clone().requires_grad_() for one in given]
        values = label_policy(*leaves, labels, temperature, vocabulary, None, 16, True, fused)
        gradients = torch.autograd.grad((values[0] + 0.1 * values[1]).sum(), leaves)
        found.append([*values, *gradients])
    names = "the log-probability", "the entropy", "the gradient of hidden states", "the gradient of the weight"
    yield from zip(names, *found)


def _layout() -> Layout:
    """Of texts, each with a noisy copy of its response behind it, and some padding."""
    columns = [[] for _ in range(5)]
    for group, (prompt, response) in enumerate(_TEXTS):
        answer = range(prompt, prompt + response)
        for who, view, places in ((PROMPT, CLEAN, range(prompt)), (0, CLEAN, answer), (0, CLEAN + 1, answer)):
            for place in places:
                token = group, who, view, place // _BLOCK, place
                for column, value in zip(columns, token):
                    column.append(value)
    layout = Layout(*(torch.tensor(column, dtype=torch.int32) for column in columns))
    return layout.padded(len(layout.group) + _PADDED)
