"""The embedding of a mask token that the weights have never seen.

An autoregressive model that becomes one of block diffusion meets a token that stands for "not yet decided". Its row of
the embedding is one that was never trained: of padding, or of an extension of the tokenizer. From there the first
noisy copies would be read as whatever that row happens to hold. `set_row` gives it a start:

  mean     the mean of the trained rows, which says the least about any token (Hewitt 2021, on new words of a model);
  normal   a draw from the normal distribution of the trained rows, channel by channel;
  a token  the row of that token.

The row of an untied output layer is set likewise, to the mean in the first two cases: no policy chooses the mask, but
a program that takes the largest of all logits must not find it there.

Invariants (tests/checkpoint/test_mask_embedding.py): the same row in every layout; no other row changes; the master
weights of the optimizer follow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.checkpoint import optimizer_state
from megatron_dlm.training.sleep import wake
from megatron_dlm.training.state import TrainState

KEEP, MEAN, NORMAL = "keep", "mean", "normal"


@torch.no_grad()
def set_row(state: TrainState, mask_id: int, trained: int, how: str | int, seed: int) -> None:
    """Set the mask's row in embedding and output layer. Collective.

    Args:
        mask_id: below the padded vocabulary.
        trained: the rows below this, without the mask's own, are those that were trained.
        how: MEAN, NORMAL, or the id of a token.
        seed: of the draw.
    """
    for table, is_head in _tables(state):
        shard = table.data
        first = state.groups.tp_rank * shard.shape[0]
        if isinstance(how, int):
            row = _sum(shard, first, [how], state).to(shard.dtype)
        else:
            known = [number for number in range(trained) if number != mask_id]
            row = _sum(shard, first, known, state) / len(known)
            if how == NORMAL and not is_head:
                squares = _sum(shard.double().square(), first, known, state) / len(known)
                noise = torch.randn(len(row), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                row = row + (squares - row.square()).clamp(min=0).sqrt() * noise.to(row.device)
        if first <= mask_id < first + shard.shape[0]:
            shard[mask_id - first] = row.to(shard.dtype)
    if state.optimizer is not None:
        wake(state)
        with platform.cuda_calls_on_cpu():
            optimizer_state.follow_weights(state.optimizer)


def _tables(state: TrainState) -> Iterator[tuple[Tensor, bool]]:
    """This rank's shards [V / TP, h] of the tables over the vocabulary, each with whether it is a head of its own.
    A tied output layer on another stage than the embedding is a copy of that, and treated as it.
    """
    for chunk in state.unwrapped_chunks():
        if chunk.pre_process:
            yield chunk.embedding.word_embeddings.weight, False
        if chunk.post_process and chunk.output_layer.weight is not None:
            yield chunk.output_layer.weight, not chunk.share_embeddings_and_output_weights


def _sum(shard: Tensor, first: int, rows: list[int], state: TrainState) -> Tensor:
    """Sum of these rows of the whole table, float64 [h], on all tensor-parallel ranks."""
    mine = [number - first for number in rows if first <= number < first + shard.shape[0]]
    total = shard[mine].double().sum(0)
    if state.groups.tp_size > 1:
        dist.all_reduce(total, group=state.groups.tp)
    return total
