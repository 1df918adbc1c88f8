"""The policy: what a token's probability means, everywhere.

policy = log-softmax(logits / temperature) over the vocabulary without the mask token and the padding of the vocabulary,
in fp32 (or better, if the logits are). The rollout engine and the trainers call `policy_scores`; nobody takes a softmax
of raw logits.

Under tensor parallelism the logits are sharded over the vocabulary; the group is an argument, None means unsharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # targets whose distributions are worked on together where a term needs all of them


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What may be predicted.

    Attributes:
        size: real tokens; the rest, up to the padded size, is never predicted.
        mask_id: nor is the mask token.
    """

    size: int
    mask_id: int


def _first_id(logits: Tensor, group: dist.ProcessGroup | None) -> int:
    """Token id of the first column of this rank's shard."""
    return 0 if group is None else dist.get_rank(group) * logits.shape[-1]


def policy_scores(
    logits: Tensor, temperature: Tensor | float, vocabulary: Vocabulary, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Tempered logits with -inf for tokens outside the policy: its log-probabilities up to a constant per row.

    Args:
        logits: [N, V / TP] shard.
        temperature: a number, or [N].
    """
    return scores_of_tokens(logits, temperature, vocabulary, _first_id(logits, group))


def scores_of_tokens(
    logits: Tensor, temperature: Tensor | float, vocabulary: Vocabulary, first: int, overwrite: bool = False
) -> Tensor:
    """`policy_scores` of any run of token ids: logits [N, W] of the tokens from `first` on.

    Args:
        overwrite: the logits are the caller's own and may be written over, which saves a table.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scores.dtype)[:, None]
    scores = scores.div_(temperature) if overwrite or scores is not logits else scores / temperature
    return exclude_(scores, vocabulary, first, float("-inf"))


def exclude_(table: Tensor, vocabulary: Vocabulary, first: int, value: float) -> Tensor:
    """The table [N, W] of the tokens from `first` on, with `value` for those outside the policy; in place and only
    where it is needed: the table is large, and a mask of its size would be one more.
    """
    table[:, max(vocabulary.size - first, 0) :] = value
    if 0 <= vocabulary.mask_id - first < table.shape[-1]:
        table[:, vocabulary.mask_id - first] = value
    return table


def _sum_over(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the shards, differentiable."""
    # Here, because an interpreter of a foreign engine, which has no megatron-core, takes the policy from this file too.
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    return reduce_from_tensor_model_parallel_region(value, group)


def _for_each_shard(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A number that each shard goes on to use for its own tokens: its gradient is the sum of theirs."""
    if group is None:
        return value
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    return copy_to_tensor_model_parallel_region(value, group)


def log_normaliser(scores: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """log of the sum of exp over the whole vocabulary, [N], differentiable."""
    highest = scores.detach().amax(-1)
    if group is not None:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    total = (scores - highest[:, None]).exp().sum(-1)
    if group is not None:
        total = _sum_over(total, group)
    return total.log() + highest


def label_logprobs(scores: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Log-probability of each label under the policy.

    Args:
        scores: [N, V / TP] from `policy_scores`.
        labels: int64 [N], token ids of the policy.

    Returns: [N], the same on all ranks of the group, differentiable.
    """
    return label_scores(scores, labels, group) - log_normaliser(scores, group)


def label_scores(scores: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The score of each label, [N]: its log-probability before it is normalised. As `label_logprobs`."""
    local = labels - _first_id(scores, group)
    here = (local >= 0) & (local < scores.shape[-1])
    picked = scores.gather(1, local.clamp(0, scores.shape[-1] - 1)[:, None])[:, 0]
    picked = torch.where(here, picked, torch.zeros_like(picked))
    return picked if group is None else _sum_over(picked, group)


def entropy(scores: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Entropy of the policy in nats, [N], differentiable."""
    logprob = scores - _for_each_shard(log_normaliser(scores, group), group)[:, None]
    return -_over_vocabulary(logprob.exp() * _finite(logprob), group)


def divergence(scores: Tensor, teacher: Tensor, kind: str, group: dist.ProcessGroup | None = None) -> Tensor:
    """How far the policy is from a teacher's at each of N targets, in nats, [N], differentiable in `scores`.

    Args:
        scores, teacher: [N, V / TP] from `policy_scores`, over the same vocabulary.
        kind: 'reverse' is KL(policy || teacher), 'forward' KL(teacher || policy), 'jsd' the Jensen-Shannon divergence.

    Source: generalised knowledge distillation, arXiv 2306.13649, eq. 1 (jsd: beta = 1/2)
    """
    own = _finite(scores - _for_each_shard(log_normaliser(scores, group), group)[:, None])
    other = _finite(teacher - log_normaliser(teacher, group)[:, None])
    allowed = ~scores.isinf()
    if kind == "reverse":
        return _over_vocabulary(own.exp() * allowed * (own - other), group)
    if kind == "forward":
        return _over_vocabulary(other.exp() * allowed * (other - own), group)
    middle = torch.logaddexp(own, other) - math.log(2.0)
    terms = own.exp() * (own - middle) + other.exp() * (other - middle)
    return 0.5 * _over_vocabulary(terms * allowed, group)


def by_chunks(function: Callable[..., Tensor], *tables: Tensor, size: int = CHUNK) -> Tensor:
    """function(*tables), [N], over some lines of the tables [N, ...] at a time, computed again in the backward pass:
    what it makes of the vocabulary is never there for more than `size` targets.
    """
    if len(tables[0]) <= size:
        return function(*tables)
    pieces = zip(*(table.split(size) for table in tables))
    if not torch.is_grad_enabled():
        return torch.cat([function(*piece) for piece in pieces])
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


def _finite(logprob: Tensor) -> Tensor:
    """Log-probabilities with 0 for tokens outside the policy, whose probability is 0 besides."""
    return logprob.masked_fill(logprob.isinf(), 0)


def _over_vocabulary(terms: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N, V / TP] -> sums over the whole vocabulary, [N]."""
    total = terms.sum(-1)
    return total if group is None else _sum_over(total, group)
