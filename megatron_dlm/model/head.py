"""The output layer and the policy's softmax as one operation: log-probabilities of labels without a table of logits.

With a vocabulary of 150,000 the logits of a row's targets are larger than anything else in training, and its loss needs
several tables of that size. Here only a tile of them is there at a time, as large as the logits of `chunk_size`
targets:

  forward   goes through the targets, `chunk_size` at a time, over the rank's whole shard of the vocabulary. Of each
            target it keeps the largest score, the sum of exponentials, the label's score and, for the entropy, the
            mean score; over tensor-parallel ranks these meet at the end, in one MAX and one SUM for all targets.
  backward  goes through the shard, a run of tokens at a time, over all targets, and computes their logits again. The
            log-normaliser is known, so no tile needs another: the weight's gradient of a run of tokens is a single
            product, written once into its place, and the gradient of the hidden states is the sum over the runs, in
            fp32. It needs no collective; who copied the hidden states to the ranks sums their gradients.

Between the two there are the hidden states, the weight, and a few numbers for each target. The price is that the logits
are computed twice. What is done with a tile of logits is memory traffic: torch's operations make several passes over
a copy in fp32; on GPUs that have triton two kernels (model/head_triton.py) take one pass each (`fused`).

(megatron-core's fused linear cross entropy is for some GPUs only, and has neither temperature, nor entropy, nor tokens
that are left out. Liger-Kernel's fused linear head for shards of the vocabulary, from 0.8.3 on, has the former two, but
one temperature for all targets, and its softmax is over every column: mask and padding would have a probability.)

Invariants (tests/model/test_head.py, test_head_triton.py): values and gradients are those of model/policy.py on the
whole table, whatever the chunk size and the number of shards; nothing of N x V elements is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_dlm.model.policy import (
    Vocabulary,
    by_chunks,
    entropy,
    exclude_,
    label_logprobs,
    label_scores,
    policy_scores,
    scores_of_tokens,
)

RUN = 64  # the runs of tokens of the backward pass are multiples of this, which matrix products like


def target_policy(
    model: nn.Module,
    output: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    vocabulary: Vocabulary,
    chunk_size: int,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`label_policy` under the head of a model, or the same from its logits.

    Args:
        model: the last pipeline stage of a `BlockDiffusionModel`.
        output: of its `forward_row`: headless, [N, h], or with chunk_size 0 the logits [N, V / TP], whose table is then
            kept.
    """
    return judged_targets(model, output, labels, temperature, vocabulary, chunk_size, with_entropy)[:2]


def judged_targets(
    model: nn.Module,
    output: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    vocabulary: Vocabulary,
    chunk_size: int,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`target_policy`, and whether each label is what the policy finds most likely, bool [N]."""
    group = model.pg_collection.tp
    if chunk_size:
        hidden = copy_to_tensor_model_parallel_region(output, group)
        return _LabelPolicy.apply(
            hidden, model.head_weight(), labels, temperature, vocabulary, group, chunk_size, with_entropy,
            model.fused_head,
        )  # fmt: skip
    scores = policy_scores(output, temperature, vocabulary, group)
    logprob = label_logprobs(scores, labels, group)
    entropies = by_chunks(partial(entropy, group=group), scores) if with_entropy else None
    with torch.no_grad():
        highest = scores.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        best = label_scores(scores, labels, group) >= highest
    return logprob, entropies, best


def label_policy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    vocabulary: Vocabulary,
    group: dist.ProcessGroup | None,
    chunk_size: int,
    with_entropy: bool = False,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label under the policy (model/policy.py) that a linear head makes of hidden states.

    Args:
        hidden: [N, h], through `copy_to_tensor_model_parallel_region` where the head is sharded. weight: [V / TP, h].
        labels: int64 [N].
        temperature: a positive number, or [N] of them; not differentiated.
        group: of the shards; None means unsharded.
        chunk_size: targets whose logits may be there at the same time, at least 1.
        fused: by Triton's kernels, where there are some for these logits: float64 is left to torch.

    Returns:
        The log-probabilities [N] and, if asked for, the entropies of the policy in nats [N], in fp32 or better; the
        same on all ranks, differentiable once in hidden states and weight.
    """
    return _LabelPolicy.apply(
        hidden, weight, labels, temperature, vocabulary, group, chunk_size, with_entropy, fused
    )[:2]  # fmt: skip


class _LabelPolicy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, vocabulary, group, chunk_size, with_entropy, fused):
        first = 0 if group is None else dist.get_rank(group) * len(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(wide)
        highest, total, moment, picked = hidden.new_zeros((4, len(hidden)), dtype=wide)
        statistics, gradient = _kernels(fused, weight)
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            found = statistics(
                F.linear(hidden[part], weight), labels[part], _part(temperature, part), vocabulary, first, with_entropy
            )
            for column, values in zip((highest, total, moment, picked), found):
                column[part] = values
        if group is not None and dist.get_world_size(group) > 1:
            own = highest.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            below = own - highest
            share = below.exp()
            sums = torch.stack([picked, share * total, share * (moment + below * total)][: 3 if with_entropy else 2])
            dist.all_reduce(sums, group=group)
            picked, total, moment = (*sums, moment)[:3]
        log_normaliser = total.log() + highest
        entropies = total.log() - moment / total if with_entropy else None
        scale = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, labels, log_normaliser, entropies, scale)
        ctx.rest = (None if scale is not None else temperature, vocabulary, first, chunk_size, gradient)
        ctx.set_materialize_grads(False)
        best = picked >= highest
        ctx.mark_non_differentiable(best)
        return picked - log_normaliser, entropies, best

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob, by_entropy, _):
        hidden, weight, labels, log_normaliser, entropies, scale = ctx.saved_tensors
        number, vocabulary, first, chunk_size, gradient = ctx.rest
        temperature = number if scale is None else scale
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=log_normaliser.dtype) if for_hidden else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        by_label = torch.zeros_like(log_normaliser) if by_logprob is None else by_logprob / temperature
        by_mean = None if by_entropy is None else by_entropy / temperature
        run = _run_length(len(hidden), len(weight), chunk_size)
        for start in range(0, len(weight), run):
            rows = weight[start : start + run]
            grad = gradient(
                F.linear(hidden, rows), labels, temperature, log_normaliser, by_label, entropies, by_mean,
                vocabulary, first + start,
            )  # fmt: skip
            if for_weight:
                torch.mm(grad.t(), hidden, out=grad_weight[start : start + run])
            if for_hidden:
                _add_product_(grad_hidden, grad, rows)
            del grad
        return (None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, *[None] * 7)


def _kernels(fused: bool, weight: Tensor) -> tuple[Callable, Callable]:
    """What makes statistics, and what makes a gradient, of a tile of logits."""
    if not fused or weight.dtype == torch.float64:
        return _statistics, _gradient
    from megatron_dlm.model import head_triton

    return head_triton.statistics, head_triton.gradient_


def _statistics(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    vocabulary: Vocabulary,
    first: int,
    with_moment: bool,
) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """Of each target the highest score, the sums of exp(x) and, with_moment, of x exp(x), x = score - highest, and the
    label's score, 0 where it is another shard's.

    Args:
        logits: [n, W] of the tokens from `first` on, which are written over.
    """
    scores = scores_of_tokens(logits, temperature, vocabulary, first, overwrite=True)
    del logits
    place, here = _places(labels, first, scores.shape[1])
    picked = scores.gather(1, place[:, None])[:, 0]
    # Finite, so that a shard of nothing but padding adds zeros, and not the difference of two infinities.
    highest = scores.amax(-1).clamp_(min=torch.finfo(scores.dtype).min / 4)
    scores.sub_(highest[:, None])
    weights = scores.exp() if with_moment else scores.exp_()
    total, moment = weights.sum(-1), 0.0
    if with_moment:
        moment = weights.mul_(exclude_(scores, vocabulary, first, 0.0)).sum(-1)
    return highest, total, moment, torch.where(here, picked, torch.zeros_like(picked))


def _gradient(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    log_normaliser: Tensor,
    by_label: Tensor,
    entropies: Tensor | None,
    by_mean: Tensor | None,
    vocabulary: Vocabulary,
    first: int,
) -> Tensor:
    """The loss by each of the logits [n, W], in their precision; they are written over.

    The gradient of a score s_j of a target with probabilities p, label l and entropy H is
    g (1[j = l] - p_j) - e p_j (log p_j + H), g and e being those of log p_l and H; of a logit that over T.

    Args:
        by_label, by_mean: g / T and e / T.
    """
    dtype, width = logits.dtype, logits.shape[1]
    logprob = scores_of_tokens(logits, temperature, vocabulary, first, overwrite=True)
    del logits
    logprob.sub_(log_normaliser[:, None])
    if by_mean is None:
        grad = logprob.exp_().mul_(-by_label[:, None])
    else:
        grad = logprob.exp()
        grad.mul_(logprob.add_(entropies[:, None]).mul_(-by_mean[:, None]).sub_(by_label[:, None]))
    del logprob
    place, here = _places(labels, first, width)
    grad.scatter_add_(1, place[:, None], torch.where(here, by_label, torch.zeros_like(by_label))[:, None])
    return exclude_(grad, vocabulary, first, 0.0).to(dtype)


def _part(temperature: Tensor | float, part: slice) -> Tensor | float:
    return temperature[part] if isinstance(temperature, Tensor) else temperature


def _places(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each label among `width` tokens from `first` on, and whether it is there at all (else some column)."""
    local = labels - first
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def _run_length(targets: int, width: int, chunk_size: int) -> int:
    """Tokens of the vocabulary whose logits for all targets take no more than those of `chunk_size` targets for all
    tokens."""
    if targets <= chunk_size:
        return width
    run = max(1, chunk_size * width // targets)
    return run if run < RUN else run // RUN * RUN


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the precision of `total`; the product has that of its factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
