"""Several denoising rounds of the same sequences, the host looking on only afterwards.

What a pass computes follows from where its sequences stand, and that is known on the device. So while nobody comes or
goes, the device can go on by itself: every shape stays the same, and what is data-dependent (which blocks are finished
and have to be committed, who has ended) is decided by tensors. A round computes n + c blocks for n sequences: the block
being denoised of each, and the finished block of up to c of them. A sequence whose finished block found no place among
the c waits for a round, one that has ended idles until the host looks; neither changes any result. There may be more
places than sequences, so that few shapes occur (CUDA graphs): empty ones compute a block of nobody.

The host gives each sequence the pages of all blocks that it may reach before it looks again (Scheduler.for_rounds).

What differs between two lots of rounds of one `shape` is the content of a few tensors, which a round writes in place:
so a round can be captured once as a CUDA graph, draw and unmasking included, and replayed for others (graphs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.batch import Progress, RunningBatch
from megatron_dlm.rollout.plan import Sequence

Forward = Callable[[Tensor, Queries, Tensor], Tensor]
"""(tokens int64 [T], queries, slots int64 [N]) -> logits [N, V / TP]."""

Decide = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(logits of n blocks, slot [n], position [n, B], may be unmasked: bool [n, B]): draw, and unmask in the batch."""


_STANDING = ("slot", "page_table", "uncommitted", "progress", "steps", "committed")


class Rounds:
    """Rounds of n sequences, all with blocks of B tokens, none with more than its last block to be committed.

    Args:
        page_table: int64 [S, P] of all slots.
        scratch: a page that nobody reads, where blocks that are computed for no purpose go.
        longest: most keys that any of them can see before the host looks again.
        width: places for sequences; None is one for each.
        commits: c, places for finished blocks in a round, at most `width`; None is half of that, rounded up: a block
            takes two steps or more as a rule.
    """

    def __init__(
        self,
        batch: RunningBatch,
        page_table: Tensor,
        page_size: int,
        scratch: int,
        sequences: Ordered[Sequence],
        longest: int,
        width: int | None = None,
        commits: int | None = None,
    ) -> None:
        self.batch, self.page_size = batch, page_size
        self.block = sequences[0].request.sampling.block_size
        device = batch.device
        count, width = len(sequences), width or len(sequences)
        self.count, empty = count, width - count
        self.slot = torch.tensor([*(one.slot for one in sequences), *[batch.spare] * empty], device=device)
        self.uncommitted = torch.tensor(
            [*(one.cached < one.start for one in sequences), *[False] * empty], device=device
        )
        self.progress = torch.zeros((width, 2), dtype=torch.int64, device=device)
        self.progress[count:, 0] = Progress.LENGTH  # nobody has ended
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.committed = torch.zeros((), dtype=torch.int64, device=device)
        commits = -(-width // 2) if commits is None else commits
        self.page_table = page_table[self.slot]
        self.scratch_line = scratch * page_size
        self.commits, self.rows = commits, commits + width
        self.key_length = [longest] * self.rows
        self.offset = torch.arange(self.block, device=device)
        self.sequence = torch.arange(self.rows, device=device).repeat_interleave(self.block)
        self.every = torch.arange(self.rows * self.block, device=device)
        self.read = self.every[commits * self.block :]  # the head is read at all positions of the current blocks

    @property
    def shape(self) -> tuple[int, ...]:
        """What must be the same for one graph to serve other rounds of the same engine."""
        return (self.block, self.commits, self.key_length[0], *self.page_table.shape)

    def take(self, other: Rounds) -> None:
        """Stand where others of the same shape stand."""
        self.count = other.count
        for name in _STANDING:
            getattr(self, name).copy_(getattr(other, name))

    def idle(self) -> None:
        """Let all sequences have ended. Rounds then change nothing: what they compute goes to the scratch page."""
        self.progress[:, 0] = Progress.LENGTH

    def round(self, forward: Forward, decide: Decide) -> None:
        """One pass, and what follows from it."""
        batch, slot = self.batch, self.slot
        running = self.progress[:, 0] < Progress.STOP
        wanting = self.uncommitted & running
        first = torch.argsort(~wanting, stable=True)[: self.commits]  # those that want to commit come first
        commits = wanting[first]
        committed = torch.zeros_like(wanting).scatter(0, first, commits)
        stepped = running & (committed | ~self.uncommitted)
        line = torch.cat([first, torch.arange(len(slot), device=slot.device)])  # [c + n], which sequence a row is of
        start = batch.start[slot]
        begin = torch.cat([(start[first] - self.block).clamp(min=0), start])
        real = torch.cat([commits, running])
        position = (begin[:, None] + self.offset).clamp(max=batch.max_length - 1)  # [c + n, B]
        place = self.page_table[line].gather(1, position // self.page_size) * self.page_size
        destination = torch.where(real[:, None], place + position % self.page_size, self.scratch_line)
        queries = Queries(
            pages=self.page_table[line],
            page_size=self.page_size,
            count=[self.block] * self.rows,
            key_length=self.key_length,
            sequence=self.sequence,
            position=position.flatten(),
            last_visible=(begin + self.block).repeat_interleave(self.block),
            write=self.every,
            destination=destination.flatten(),
        )
        tokens = batch.tokens[slot[line][:, None], position]
        logits = forward(tokens.flatten(), queries, self.read)
        current = position[self.commits :]
        decide(logits, slot, current, stepped[:, None] & ~batch.known[slot[:, None], current])
        now = batch.advance(slot, stepped)
        self.progress.copy_(torch.where(stepped[:, None], now, self.progress))
        self.uncommitted.copy_(torch.where(stepped, now[:, 0] == Progress.NEXT_BLOCK, self.uncommitted))
        self.steps += stepped.sum()
        self.committed += commits.sum()

    def outcome(self) -> tuple[list[list[int]], int, int]:
        """For each sequence: `Progress`, end of the response, start and end of its block, denoising steps of it, and
        whether the block before it is still to be committed. And the denoising steps and commits of all together. Here
        the host waits for the device, once.
        """
        batch, slot, count = self.batch, self.slot[: self.count], self.count
        columns = [batch.start[slot], batch.block_end[slot], batch.block_steps[slot], self.uncommitted[:count].long()]
        standing = torch.cat([self.progress[:count], torch.stack(columns, dim=1)], dim=1)
        sums = torch.stack([self.steps, self.committed])
        *numbers, steps, committed = torch.cat([standing.flatten(), sums]).tolist()
        width = standing.shape[1]
        return [numbers[first : first + width] for first in range(0, count * width, width)], steps, committed
