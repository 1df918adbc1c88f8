"""The loss of fine-tuning over the targets of a row.

    loss = 1/D * ( sum of weight * -log p over targets + c * sum of the entropy over those that are predicted right )

D is the number of tokens to learn in the whole update, weights are those of the views (sft/objectives.py). The second
term, with --confidence-coef c, makes a model that is right also sure, so that it unmasks more tokens at a time
(confidence-aware parallel training of LLaDA2.0, arXiv 2512.15745). Targets of the autoregressive loss beside the
objective (--ar-loss-coef, their weight) have no part in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.diffusion.rows import Row
from megatron_dlm.model.head import judged_targets
from megatron_dlm.model.policy import Vocabulary


def sft_forward(
    vocabulary: Vocabulary,
    num_tokens: int,
    loss_chunk_size: int = 0,
    causal_from: int | None = None,
    confidence_coef: float = 0.0,
):
    """forward_step of training/step.py for fine-tuning; a row's target weights are divided here by D.

    Args:
        num_tokens: D.
        loss_chunk_size: of model/head.py; 0 for a table of the logits of all targets.
        causal_from: items from this number on (`Targets.response`) are of the autoregressive loss beside the objective;
            None where there are none.
        confidence_coef: c.
    """

    def forward_step(row: Row, model):
        output = model.module.forward_row(row, headless=loss_chunk_size > 0)

        def loss_fn(output: Tensor):
            targets = row.targets
            logprob, entropy, right = judged_targets(
                model.module, output, targets.label, 1.0, vocabulary, loss_chunk_size, confidence_coef > 0
            )
            loss = -(targets.weight.to(logprob.dtype) * logprob).sum() / num_tokens
            ours = torch.ones_like(logprob)
            if causal_from is not None:
                ours = (targets.response < causal_from).to(logprob.dtype)
            metrics = {"targets": ours.sum(), "nll": -(ours * logprob).sum(), "right": (ours * right).sum()}
            if causal_from is not None:
                metrics |= {"causal_targets": (1 - ours).sum(), "causal_nll": ((ours - 1) * logprob).sum()}
            if confidence_coef:
                sure = (entropy * ours * right).sum()
                loss = loss + confidence_coef * sure / num_tokens
                metrics["right_entropy"] = sure
            return loss, metrics

        return output, loss_fn

    return forward_step
