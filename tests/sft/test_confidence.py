"""The term that makes a model sure where it is right."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.sft import SFTConfig
from megatron_dlm.data.sft_data import Sample
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.sft.objective import sft_forward
from megatron_dlm.sft.updates import sft_items
from megatron_dlm.training.step import accumulate_gradients
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.sft.test_objectives import SEED, STEP, blocks_of, model, samples, state
from tests.tiny import allowed_logprobs, explicit_logits, furthest, gradients, vocabulary


@pytest.mark.parametrize("chunk", [0, 7])
def test_confidence_where_the_model_is_right(chunk: int) -> None:
    """The entropy of the model at hidden tokens that it finds most likely, over D."""
    sample = samples()[5]
    base = SFTConfig(min_mask_ratio=1.0, loss_on_pad=False)
    first = len(sample.prompt_ids)
    text = [*sample.prompt_ids, *sample.response_ids]
    length = len(text) + -len(text) % 4
    # A response that the model itself would write in half of its places
    answer = list(sample.response_ids)
    for start in range(first // 4 * 4, length, 4):
        shown = torch.tensor(
            [t if p < first else MASK_ID if p >= start else answer[p - first] for p, t in enumerate(text[: start + 4])]
            + [MASK_ID] * max(0, start + 4 - len(text))
        )
        slots = torch.arange(start, start + 4)
        best = allowed_logprobs(
            explicit_logits(model(), shown, torch.arange(len(shown)), blocks_of(len(shown), 4), slots)
        ).argmax(-1)
        for n, p in enumerate(range(start, start + 4)):
            if p % 2 and first <= p < len(text):
                answer[p - first] = int(best[n])
    chosen = [Sample("c", sample.prompt_ids, tuple(answer))]
    text = [*sample.prompt_ids, *answer]
    total, loss, right = 0, torch.zeros((), dtype=torch.float64), 0
    for start in range(first // 4 * 4, length, 4):
        shown = torch.tensor(
            [text[p] if p < max(first, start) and p < len(text) else MASK_ID for p in range(start + 4)]
        )
        mine = list(range(max(first, start), min(start + 4, len(text))))
        logprob = allowed_logprobs(
            explicit_logits(model(), shown, torch.arange(len(shown)), blocks_of(len(shown), 4), torch.tensor(mine))
        )
        for n, p in enumerate(mine):
            loss, total = loss - logprob[n, text[p]], total + 1
            if int(logprob[n].argmax()) == text[p]:
                finite = logprob[n][~logprob[n].isinf()]
                loss, right = loss - 0.3 * (finite.exp() * finite).sum(), right + 1
    assert 0 < right < total
    drawn = sft_items(chosen, STEP, SEED, Grid(4), base, PAD_ID)
    row = build_row(list(enumerate(drawn.items)), 64, MASK_ID, PAD_ID).to(platform.device())
    metrics = accumulate_gradients(state(), [row], sft_forward(vocabulary(), total, chunk, None, 0.3), 64)
    assert metrics["right"] == right and metrics["loss"] == pytest.approx(loss.item() / total, rel=1e-10)
    grads = {name: parameter.main_grad.clone() for name, parameter in state().named_parameters()}
    assert furthest(grads, gradients(model(), loss / total)) < 1e-9
