"""What the scheduler says: running sequences as the host knows them, and what one pass computes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dlm.rollout.pages import Prefix
from megatron_dlm.rollout.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request, as the host knows it.

    Attributes:
        slot: its line in the table of the batch. order: of admission.
        start, block_end: the block being denoised. block_steps: denoising steps that it took.
        text_end: one past the last position that the text can reach, its terminal block included.
        cached: positions before this have their final keys and values in its pages.
        pages: of its text, in order.
        prefix: the prompt blocks that it shares, waits for or computes.
        shared_length: tokens of the prompt that can be shared.
        starved: it waits for pages that older sequences hold; nobody new is let in before it has them.
        uncommitted: the block before the current one was finished in the last pass, so its final keys are not stored.
    """

    request: Request
    slot: int
    order: int
    start: int
    block_end: int
    text_end: int
    shared_length: int
    block_steps: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    prefix: Prefix | None = None
    starved: bool = False
    uncommitted: bool = False

    @property
    def prefilling(self) -> bool:
        """More than the block before the current one is to be computed."""
        return self.start - self.cached > self.request.sampling.block_size


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `first` to `end` of a sequence, computed in one pass.

    Attributes:
        write_from: keys and values are stored from here on; those before it are stored already, and computed again only
            because the head is read there.
        start: first position of the current block. denoise: whether the head is read at its masked positions.
        commit: the block before the current one gets its final keys.
    """

    slot: int
    first: int
    end: int
    write_from: int
    start: int
    denoise: bool
    commit: bool = False


@dataclass(slots=True)
class Plan:
    """One pass.

    Attributes:
        spans: what is computed, at most one span per slot.
        copies: (source, destination) pages to be copied before the pass.
        tables: slots whose page table changed, with their pages.
        restarts: slots whose current block begins anew, as they lost what its first step had stored.
        starts: sequences that were admitted.
    """

    spans: list[Span] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    tables: dict[int, list[int]] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=list)
    starts: list[Sequence] = field(default_factory=list)
