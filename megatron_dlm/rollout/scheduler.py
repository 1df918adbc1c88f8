"""Which tokens the next pass of the engine computes, and in which pages their keys and values go.

Pure decisions on the host: integers in, a `Plan` out. Each call of `plan`

  1. admits waiting requests while there are slots and pages for them;
  2. gives every running sequence the pages that it needs next, oldest first. When pages run out, prefixes that nobody
     uses are forgotten, then the youngest sequences lose their pages and will compute them again;
  3. fills the pass up to its token budget: sequences that decode take turns, and prompts take what these leave, in
     chunks of whole blocks.

Nothing can block: the oldest sequence gets its pages from all others, a pass takes at least one sequence, and a request
that could not run alone is refused when it is submitted.

What a sequence computes. In a model of attention blocks: everything from the end of its stored prefix to the end of the
block being denoised. So prompts, and the commit of a finished block, ride on a denoising step. In a model of full
attention: the whole text at the first step of a decoding block, masks to its end included; at later steps the text up
to `horizon` positions behind the block, and of that only what begins with the block, if the request lets the text
before it stand as the first step left it (`prefix_cache`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from megatron_dlm.rollout.pages import PagePool, Prefix, PrefixTable
from megatron_dlm.rollout.plan import Plan, Sequence, Span
from megatron_dlm.rollout.request import Request


class Scheduler:
    """Decides the passes of one engine.

    Args:
        num_slots: sequences in flight.
        num_pages, page_size: of the KV cache.
        max_tokens: token budget of a pass.
        full_attention, logit_shift: of the model. Token p is read at position p - logit_shift.
        share_prompts, fuse_commit, longest_first: as in EngineOptions.
    """

    def __init__(
        self,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_tokens: int,
        full_attention: bool = False,
        logit_shift: int = 0,
        share_prompts: bool = True,
        fuse_commit: bool = True,
        longest_first: bool = False,
    ) -> None:
        self.page_size, self.max_tokens = page_size, max_tokens
        self.full_attention, self.logit_shift = full_attention, logit_shift
        self.share_prompts, self.fuse_commit, self.longest_first = share_prompts, fuse_commit, longest_first
        self.pool = PagePool(num_pages)
        self.prefixes = PrefixTable(self.pool)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Sequence] = {}  # by slot, oldest first
        self.turns: deque[Sequence] = deque()  # those whose last pass is longest ago come first
        self.num_preemptions = 0
        self.num_shared_tokens = 0
        self._free_slots = list(range(num_slots))[::-1]
        self._admitted = 0

    # Requests -------------------------------------------------------------------------------------------------------

    def submit(self, requests: Iterable[Request]) -> None:
        self.waiting.extend(requests)
        if self.longest_first:  # those that were begun before come first: they have waited longest
            order = lambda request: (request.partial is None, -request.tokens_left)
            self.waiting = deque(sorted(self.waiting, key=order))

    def vacancies(self, pages_each: int) -> int:
        """How many more requests than wait already could start, if each needs so many pages."""
        return min(len(self._free_slots), self._available() // pages_each) - len(self.waiting)

    def most_pages(self, request: Request) -> int:
        """Pages that a request can need when it runs alone: those of its text, and the copy of a shared one."""
        return self._pages_for(request.text_end(self.full_attention)) + 1

    def take_waiting(self, wanted: Callable[[Request], bool]) -> list[Request]:
        """Remove the waiting requests that are wanted; returns them."""
        taken = [request for request in self.waiting if wanted(request)]
        self.waiting = deque(request for request in self.waiting if not wanted(request))
        return taken

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended: its slot and its pages are free."""
        self._let_go(sequence)
        del self.running[sequence.slot]
        self.turns.remove(sequence)
        self._free_slots.append(sequence.slot)

    def stepped(self, sequence: Sequence, block_done: bool) -> None:
        """A sequence took a denoising step, which may have finished its block."""
        sequence.block_steps += 1
        if block_done:
            block = sequence.request.sampling.block_size
            sequence.start = sequence.block_end
            sequence.block_end = min(sequence.start + block, sequence.text_end)
            sequence.block_steps = 0
            sequence.uncommitted = not self.full_attention

    def take_counts(self) -> tuple[int, int]:
        """Sequences that lost their pages, and prompt tokens that were shared, since the last call."""
        counts = self.num_preemptions, self.num_shared_tokens
        self.num_preemptions = self.num_shared_tokens = 0
        return counts

    def drop_cache(self) -> list[int]:
        """Forget all keys and values; returns the slots whose current block begins anew."""
        plan = Plan()
        for sequence in self.running.values():
            self._preempt(sequence, plan)
        self.prefixes.clear()
        return plan.restarts

    # The next pass --------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        plan = Plan()
        self._admit(plan)
        ready = {sequence.order for sequence in list(self.running.values()) if self._has_room(sequence, plan)}
        # A sequence that found room may have lost it again to an older one that was looked at later: none is older.
        self._fill(plan, ready)
        return plan

    def _admit(self, plan: Plan) -> None:
        if any(sequence.starved for sequence in self.running.values()):
            return  # they were here before
        promised = 0
        while self.waiting and self._free_slots:
            request = self.waiting[0]
            text = len(request.prompt_ids) + request.num_done + request.sampling.block_size
            needed = self._pages_for(request.text_end(True) if self.full_attention else text) + 1
            # One page more for everybody who runs: they all grow.
            if self.running and self._available() < promised + needed + len(self.running):
                return
            promised += needed
            self.waiting.popleft()
            plan.starts.append(self._start(request))

    def _start(self, request: Request) -> Sequence:
        prompt, block = len(request.prompt_ids), request.sampling.block_size
        known = prompt + request.num_done
        text_end = request.text_end(self.full_attention)
        start = known if self.full_attention else known - known % block
        shared = 0 if self.full_attention or not self.share_prompts else prompt - prompt % block
        slot = self._free_slots.pop()
        sequence = Sequence(request, slot, self._admitted, start, min(start + block, text_end), text_end, shared)
        self._admitted += 1
        self.running[slot] = sequence
        self.turns.append(sequence)
        return sequence

    def _available(self) -> int:
        return self.pool.num_free + self.prefixes.num_idle_pages

    def for_rounds(self, rounds: int) -> list[Sequence] | None:
        """The running sequences, if they can make `rounds` passes without another decision: none waits, all decode in
        blocks of one size, they fit into one pass, and each can have the pages of all blocks that it may reach without
        taking them from another. Else None.

        Their page tables are in `Sequence.pages` then.
        """
        running = list(self.running.values())
        if not running or self.full_attention or self.logit_shift or (self.waiting and self._free_slots):
            return None
        block = running[0].request.sampling.block_size
        if 2 * block * len(running) > self.max_tokens:
            return None
        missing = []
        for one in running:
            decodes = one.pages and one.cached >= one.start - block and (one.start == one.cached or one.uncommitted)
            if not decodes or one.request.sampling.block_size != block:
                return None
            reach = min(one.start + rounds * block, one.text_end)
            missing.append(max(self._pages_for(reach) - len(one.pages), 0))
        while self.pool.num_free < sum(missing):
            if not self.prefixes.evict(in_use=False):
                return None
        for one, count in zip(running, missing):
            one.pages += self.pool.take(count)
        return running

    def after_rounds(self, sequence: Sequence, start: int, block_end: int, block_steps: int, uncommitted: bool) -> None:
        """Where a sequence stands after such passes."""
        sequence.start, sequence.block_end, sequence.block_steps = start, block_end, block_steps
        sequence.uncommitted = uncommitted
        sequence.cached = start - sequence.request.sampling.block_size * uncommitted

    # Pages ----------------------------------------------------------------------------------------------------------

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _has_room(self, sequence: Sequence, plan: Plan) -> bool:
        """Give a sequence the pages of its next span. False: it has to wait, for pages or for its prompt."""
        if not sequence.pages and sequence.shared_length and not self._join(sequence, plan):
            return False
        end = sequence.text_end if self.full_attention else sequence.block_end
        missing = self._pages_for(end) - len(sequence.pages)
        if missing > 0:
            if not self._reclaim(missing, sequence, plan):
                sequence.starved = True  # it keeps what it has, as long as nobody older needs that
                return False
            sequence.pages += self.pool.take(missing)
            plan.tables[sequence.slot] = sequence.pages
        sequence.starved = False
        return True

    def _join(self, sequence: Sequence, plan: Plan) -> bool:
        """Take part in the prefix of a sequence's prompt: share it if it is complete, else compute it, unless another
        sequence does. False: wait.
        """
        prefix = sequence.prefix
        if prefix is None or prefix not in self.prefixes:
            self._leave_prefix(sequence)
            prefix = sequence.prefix = self.prefixes.find(sequence.request.prefix_key, sequence.shared_length)
            prefix.users += 1
        if prefix.complete:
            return self._share(sequence, prefix, plan)
        if prefix.leader is not None:
            sequence.starved = False  # it waits for the prompt, not for pages
            return False
        if not prefix.pages:
            wanted = self._pages_for(prefix.length)
            if not self._reclaim(wanted, sequence, plan):
                self._leave_prefix(sequence)
                sequence.starved = True
                return False
            prefix.pages = self.pool.take(wanted)
        prefix.leader = sequence.order
        self.pool.share(prefix.pages)
        sequence.pages = list(prefix.pages)
        sequence.cached = prefix.filled
        plan.tables[sequence.slot] = sequence.pages
        return True

    def _share(self, sequence: Sequence, prefix: Prefix, plan: Plan) -> bool:
        """Share a complete prefix; its last page is copied if the sequence is going to write into it."""
        pages = list(prefix.pages)
        self.pool.share(pages)  # first of all, so that nothing below can free them
        if prefix.length % self.page_size:
            if not self._reclaim(1, sequence, plan):
                self.pool.release(pages)
                self._leave_prefix(sequence)
                sequence.starved = True
                return False
            (own,) = self.pool.take(1)
            plan.copies.append((pages[-1], own))
            self.pool.release(pages[-1:])
            pages[-1] = own
        sequence.pages, sequence.cached = pages, prefix.length
        self.num_shared_tokens += prefix.length
        plan.tables[sequence.slot] = pages
        return True

    def _reclaim(self, count: int, sequence: Sequence, plan: Plan) -> bool:
        """Make `count` pages free for a sequence, at the cost of nobody older."""
        while self.pool.num_free < count:
            if self.prefixes.evict(in_use=False):
                continue
            younger = [one for one in self.running.values() if one.order > sequence.order and one.pages]
            if younger:
                self._preempt(younger[-1], plan)
                younger[-1].starved = True
                self.num_preemptions += 1
            elif not self.prefixes.evict(in_use=True):
                return False
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Take a sequence's pages away. What they held is computed again, exactly: keys and values of finished blocks
        depend on tokens alone. Under full attention those of a prefix cache depend on the state in which the block's
        first step found the text, so the block begins anew (and draws the same tokens again).
        """
        self._let_go(sequence)
        if self.full_attention and sequence.block_steps and sequence.request.sampling.prefix_cache:
            sequence.block_steps = 0
            plan.restarts.append(sequence.slot)

    def _let_go(self, sequence: Sequence) -> None:
        self._leave_prefix(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.cached, sequence.uncommitted = [], 0, False

    @staticmethod
    def _leave_prefix(sequence: Sequence) -> None:
        prefix = sequence.prefix
        if prefix is not None:
            prefix.users -= 1
            if prefix.leader == sequence.order:
                prefix.leader = None
        sequence.prefix = None

    # Tokens ---------------------------------------------------------------------------------------------------------

    def _fill(self, plan: Plan, ready: set[int]) -> None:
        able = [sequence for sequence in self.turns if sequence.order in ready]
        decoding = sum(self._count(sequence) for sequence in able if not sequence.prefilling)
        left, for_prompts = self.max_tokens, max(self.max_tokens - decoding, self.max_tokens // 8)
        taken: list[Sequence] = []
        for sequence in able:
            prompt = sequence.prefilling and not self.full_attention
            span = self._span(sequence, min(left, for_prompts) if prompt else left, not taken)
            if span is None:
                if prompt:
                    continue  # whoever decodes may still fit
                break  # those behind it had their turn later
            plan.spans.append(span)
            taken.append(sequence)
            left -= span.end - span.first
            if prompt:
                for_prompts -= span.end - span.first
            sequence.cached = max(sequence.cached, min(span.end, sequence.start))
            if span.commit:
                sequence.uncommitted = False
            if sequence.prefix is not None and sequence.prefix.leader == sequence.order:
                sequence.prefix.filled = min(sequence.cached, sequence.prefix.length)
        chosen = {sequence.order for sequence in taken}
        self.turns = deque([one for one in self.turns if one.order not in chosen] + taken)

    def _count(self, sequence: Sequence) -> int:
        span = self._whole_span(sequence)
        return span.end - span.first

    def _span(self, sequence: Sequence, left: int, alone: bool) -> Span | None:
        """What a sequence computes in this pass; None if that does not fit into the `left` tokens. The first sequence
        of a pass always fits.
        """
        whole = self._whole_span(sequence)
        if whole.end - whole.first <= left:
            return whole
        if sequence.prefilling and not self.full_attention:
            block = sequence.request.sampling.block_size
            chunk = max(left // block * block, block if alone else 0)
            if not chunk:
                return None
            end = min(sequence.cached + chunk, sequence.start)
            return Span(sequence.slot, sequence.cached, end, sequence.cached, sequence.start, False)
        return whole if alone else None

    def _whole_span(self, sequence: Sequence) -> Span:
        """The span that ends with a denoising step (or, where commits are not fused, with a commit)."""
        slot, start, cached, shift = sequence.slot, sequence.start, sequence.cached, self.logit_shift
        if self.full_attention:
            sampling = sequence.request.sampling
            later = sequence.block_steps > 0
            first = max(start - shift, 0) if later and sampling.prefix_cache else 0
            end = sequence.text_end
            if later and sampling.horizon is not None:
                end = min(end, sequence.block_end + sampling.horizon)
            return Span(slot, first, end, first, start, True)
        if not self.fuse_commit and cached < start:
            return Span(slot, cached, start, cached, start, False, sequence.uncommitted)
        first = min(cached, max(start - shift, 0))
        return Span(slot, first, sequence.block_end, cached, start, True, sequence.uncommitted)
