"""From logits to unmasked tokens: the policy, the draw, and which of the drawn tokens are kept.

By operations of torch, or (`fused`) by kernels in Triton: two for the draw (diffusion/sampling_triton.py) and one more
while any running sequence has top-k or top-p (filters_triton.py), one for what is kept of whole blocks
(unmask_triton.py). None of these waits for the host, and the draw reads the logits where they are, so it takes all
positions at a time. Logits in float64 are torch's in both ways.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.diffusion.sampling import Asked, DrawRules, Draws, draw
from megatron_dlm.diffusion.unmasking import select
from megatron_dlm.model.policy import Vocabulary, policy_scores
from megatron_dlm.rollout.batch import RunningBatch

_TABLE_BYTES = 2**28  # of one [rows, V] table in float64
_GATHERED_BYTES = 2**30  # of the whole logits of positions whose shards the kernels need together


Rules = list[tuple[slice, DrawRules, Asked]]
"""By which rules torch draws N positions, so many at a time as it works on: which of the N they are, their rules, and
what these ask for. Found out once for all rounds of the same slots."""


class Denoiser:
    """Decides the denoising steps of an engine's sequences.

    Args:
        vocabulary: what the policy ranges over. tp_group: over which the logits are sharded; None is unsharded.
        fused: by Triton's kernels, where there are some for it.
    """

    def __init__(
        self, batch: RunningBatch, vocabulary: Vocabulary, tp_group: dist.ProcessGroup | None, fused: bool = False
    ) -> None:
        self.batch, self.vocabulary, self.tp_group, self.fused = batch, vocabulary, tp_group, fused
        self._rows = max(1, _TABLE_BYTES // (8 * vocabulary.size))  # positions that torch works on at a time

    def rules(self, where: Tensor) -> Rules | None:
        """Those of N positions in these slots [N]; None with kernels, which find theirs themselves. Here the host waits
        for the device.
        """
        return None if self.fused else self._rules_of_torch(where)

    def _rules_of_torch(self, where: Tensor) -> Rules:
        found = []
        for first in range(0, len(where), self._rows):
            part = slice(first, first + self._rows)
            rules = self.batch.draw_rules(where[part])
            found.append((part, rules, Asked.by(rules)))
        return found

    def draw(self, logits: Tensor, where: Tensor, position: Tensor, rules: Rules | None = None) -> Draws:
        """One token for each of N positions.

        Args:
            logits: [N, V / TP].
            where, position: int64 [N], slots and positions in the text.
            rules: `rules(where)`, if it is known.
        """
        if self.fused and logits.dtype != torch.float64:
            return self._agreed(self._drawn_by_kernels(logits, where, position))
        draws = _no_draws(where)
        for rows, *how in self._rules_of_torch(where) if rules is None else rules:
            part = self._drawn_by_torch(logits[rows], where[rows], position[rows], *how)
            for field in fields(Draws):
                getattr(draws, field.name)[rows] = getattr(part, field.name)
        return self._agreed(draws)

    def _drawn_by_torch(self, logits: Tensor, slot: Tensor, position: Tensor, rules: DrawRules, asked: Asked) -> Draws:
        batch = self.batch
        scores = policy_scores(logits, rules.temperature, self.vocabulary, self.tp_group)
        uniform = uniforms(batch.stream[slot], position, batch.steps_taken[slot])
        return draw(self._whole(scores), uniform, rules, asked)

    def _drawn_by_kernels(self, logits: Tensor, slot: Tensor, position: Tensor) -> Draws:
        """In one go; with shards in parts, because whole logits are a copy."""
        from megatron_dlm.diffusion.sampling_triton import draw_logits

        batch, vocabulary = self.batch, self.vocabulary
        of_slots = batch.draw_rules(slice(None)), batch.stream, batch.steps_taken
        rows = max(1, len(slot))
        if self.tp_group is not None:
            width = logits.shape[1] * dist.get_world_size(self.tp_group)
            rows = max(1, _GATHERED_BYTES // (logits.element_size() * width))
        split = zip(*(one.split(rows) for one in (logits, slot, position)))
        policy = vocabulary.size, vocabulary.mask_id
        parts = [draw_logits(self._whole(one), *at, *of_slots, *policy, batch.filters) for one, *at in split]
        if len(parts) == 1:
            return parts[0]
        return Draws(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Draws)))

    def _agreed(self, draws: Draws) -> Draws:
        """The draws of the first rank on all tensor-parallel ranks: they must not differ in a single bit, and a kernel
        that adds in another order would be enough.
        """
        if self.tp_group is None:
            return draws
        table = torch.stack([getattr(draws, field.name).double() for field in fields(Draws)])
        dist.broadcast(table, dist.get_global_rank(self.tp_group, 0), group=self.tp_group)
        return Draws(table[0].long(), *table[1:])

    def _whole(self, scores: Tensor) -> Tensor:
        """[N, V / TP] -> [N, V], scores or logits."""
        if self.tp_group is None:
            return scores
        shards = [torch.empty_like(scores) for _ in range(dist.get_world_size(self.tp_group))]
        dist.all_gather(shards, scores.contiguous(), group=self.tp_group)
        return torch.cat(shards, dim=-1)

    def step(self, logits: Tensor, slot: Tensor, sequence: Tensor, place: Tensor, version: int) -> None:
        """Draw at N positions and unmask some.

        Args:
            logits: [N, V / TP].
            slot: int64 [n], the slots of the pass.
            sequence, place: int64 [N], to which of them a position belongs, and where it stands in the text. Those that
                are known already have no say.
            version: of the weights.
        """
        batch, where = self.batch, slot[sequence]
        draws = self.draw(logits, where, place)
        column = place - batch.start[where]
        shape = (len(slot), batch.widest_block)
        confidence = torch.zeros(shape, dtype=torch.float64, device=batch.device)
        confidence[sequence, column] = draws.confidence.double()
        masked = torch.zeros(shape, dtype=torch.bool, device=batch.device)
        masked[sequence, column] = ~batch.known[where, place]
        chosen = select(batch.unmask_rules(slot), confidence, masked)[sequence, column]
        where, place = where[chosen], place[chosen]
        batch.tokens[where, place] = draws.token[chosen]
        batch.known[where, place] = True
        batch.step[where, place] = batch.steps_taken[where] + 1
        batch.logprob[where, place] = draws.logprob[chosen].double()
        batch.sampling_logprob[where, place] = draws.sampling_logprob[chosen].double()
        batch.version[where, place] = version

    def step_blocks(
        self,
        logits: Tensor,
        slot: Tensor,
        position: Tensor,
        masked: Tensor,
        version: Tensor,
        rules: Rules | None = None,
    ) -> None:
        """The same for whole blocks, in shapes that do not depend on what is chosen.

        Args:
            logits: [n * B, V / TP].
            slot: int64 [n]. position: int64 [n, B], the current blocks.
            masked: bool [n, B], what may be unmasked.
            version: int64 [], of the weights.
            rules: of all n * B positions, if they are known.
        """
        batch, line = self.batch, slot[:, None]
        draws = self.draw(logits, slot.repeat_interleave(position.shape[1]), position.flatten(), rules)
        if self.fused:
            from megatron_dlm.rollout.unmask_triton import WIDEST, unmask

            if position.shape[1] <= WIDEST:
                return unmask(batch, draws, slot, position, masked, version)
        chosen = select(batch.unmask_rules(slot), draws.confidence.double().view_as(masked), masked)
        values = {
            "tokens": draws.token.view_as(position),
            "known": True,
            "step": batch.steps_taken[line] + 1,
            "logprob": draws.logprob.double().view_as(position),
            "sampling_logprob": draws.sampling_logprob.double().view_as(position),
            "version": version,
        }
        for name, value in values.items():
            table = getattr(batch, name)
            table[line, position] = torch.where(chosen, value, table[line, position])


def _no_draws(where: Tensor) -> Draws:
    """Room for draws of so many positions."""
    values = torch.empty((3, len(where)), dtype=torch.float64, device=where.device)
    return Draws(torch.empty_like(where), *values)
