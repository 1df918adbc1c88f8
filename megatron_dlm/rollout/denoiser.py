"""From logits to unmasked tokens: the policy, the draw, and which of the drawn tokens are kept."""

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


class Denoiser:
    """Decides the denoising steps of an engine's sequences.

    Args:
        vocabulary: what the policy ranges over. tp_group: over which the logits are sharded; None is unsharded.
    """

    def __init__(self, batch: RunningBatch, vocabulary: Vocabulary, tp_group: dist.ProcessGroup | None) -> None:
        self.batch, self.vocabulary, self.tp_group = batch, vocabulary, tp_group
        self._rows = max(1, _TABLE_BYTES // (8 * vocabulary.size))  # positions that are worked on at a time

    def rules(self, where: Tensor) -> list[tuple[DrawRules, Asked]]:
        """By which rules N positions in these slots [N] are drawn, in parts of so many as `draw` works on at a time."""
        rules = [self.batch.draw_rules(slot) for slot in where.split(self._rows)]
        return [(part, Asked.by(part)) for part in rules]

    def draw(
        self, logits: Tensor, where: Tensor, position: Tensor, rules: list[tuple[DrawRules, Asked]] | None = None
    ) -> Draws:
        """One token for each of N positions, in parts: each makes several tables of its size.

        Args:
            logits: [N, V / TP].
            where, position: int64 [N], slots and positions in the text.
            rules: `rules(where)`, if it is known.
        """
        batch, parts = self.batch, []
        split = (one.split(self._rows) for one in (logits, where, position))
        for logits_part, slot, place, how in zip(*split, rules or self.rules(where)):
            uniform = uniforms(batch.stream[slot], place, batch.steps_taken[slot])
            scores = policy_scores(logits_part, batch.temperature[slot], self.vocabulary, self.tp_group)
            parts.append(draw(self._whole(scores), uniform, *how))
        columns = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Draws))
        return self._agreed(Draws(*columns))

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
        """[N, V / TP] -> [N, V]."""
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
        version: int,
        rules: list[tuple[DrawRules, Asked]],
    ) -> None:
        """The same for whole blocks, in shapes that do not depend on what is chosen.

        Args:
            logits: [n * B, V / TP].
            slot: int64 [n]. position: int64 [n, B], the current blocks.
            masked: bool [n, B], what may be unmasked.
            rules: of all n * B positions.
        """
        batch, line = self.batch, slot[:, None]
        draws = self.draw(logits, slot.repeat_interleave(position.shape[1]), position.flatten(), rules)
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
