"""The rollout engine: submit requests, step, receive traces.

Sequences at different blocks and denoising steps share every pass. A pass gives each sequence the tokens whose final
keys are not in the cache yet (chunks of its prompt at first, later the block that was just finished) together with the
block being denoised; under the visibility rule that is exact, so neither prefill nor the commit of a block costs a pass
of its own, and the terminal block is never committed. The responses to one prompt share the pages of its full blocks,
which are computed once. The head and the softmax see masked positions only. What a pass computes is decided in
scheduler.py; this file carries it out.

A sequence's `num_forwards` counts the passes that denoised it and the passes that only committed a block, not prefill.
A commit rides on the next denoising step, so it equals the number of denoising steps (but for an aborted response: the
steps of its dropped block were forwards too; and unless `fuse_commit` is off).

The result is a function of the weights and of each request's key: not of the batch, of the order of submission, of the
token budget, of pages and preemptions, or of the number of replicas (in floating point, up to the rounding of the
matrix products; docs/architecture.md).

    engine.submit(requests)
    while not engine.idle:
        traces += engine.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.model.block_diffusion import BlockDiffusionModel
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.model.row_params import RowParams
from megatron_dlm.rollout.attention.backends import backend
from megatron_dlm.rollout.attention.queries import Queries
from megatron_dlm.rollout.batch import Progress, RunningBatch
from megatron_dlm.rollout.denoiser import Denoiser, Rules
from megatron_dlm.rollout.graphs import GraphedRounds, graphs_for, width_for
from megatron_dlm.rollout.kv_cache import BlockKVCache, CacheShape, num_pages
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.plan import Plan, Sequence, Span
from megatron_dlm.rollout.request import Request, check
from megatron_dlm.rollout.rounds import Rounds
from megatron_dlm.rollout.scheduler import Scheduler
from megatron_dlm.rollout.stats import EngineStats

_FINISHED = {Progress.STOP: "stop", Progress.LENGTH: "length"}


class Engine:
    """Generates responses with a model that holds all layers on this rank (tensor-parallel at most).

    All ranks of the tensor-parallel group make the same calls with the same requests, and hold the same state: each
    draws from the same gathered policy with the same keys, and takes every decision from that. Replicas that share
    experts make their passes together: each calls `step` until `idle`, which is then the same for all of them.

    Args:
        model: a chunk with both ends of the pipeline. Its weights are read at each pass, so an update is seen at once;
            call `drop_cache` after it.
        vocabulary: what the policy ranges over.
        options: sizes and switches.

    Attributes:
        weight_version: recorded with each token that is unmasked from now on; whoever changes the weights raises it.
        stats: what was done so far.

    Raises:
        ConfigError: the model is only a part of a pipeline, its key-value heads cannot be divided, or the KV cache is
            too small for one text.
    """

    def __init__(self, model: BlockDiffusionModel, vocabulary: Vocabulary, options: EngineOptions) -> None:
        if not (model.pre_process and model.post_process):
            raise ConfigError(
                "The rollout engine needs all layers on one rank. Build the rollout model with pipeline size 1."
            )
        self.model, self.vocabulary, self.options = model, vocabulary, options
        self.tp_group = model.pg_collection.tp if dist.get_world_size(model.pg_collection.tp) > 1 else None
        config, weight = model.config, model.embedding.word_embeddings.weight
        shares_experts = config.num_moe_experts is not None and config.expert_model_parallel_size > 1
        self.expert_group = model.pg_collection.tp_ep if shares_experts else None
        self.device = weight.device
        kv_heads = config.num_query_groups // config.tensor_model_parallel_size
        if kv_heads * config.tensor_model_parallel_size != config.num_query_groups:
            raise ConfigError(
                f"--tensor-model-parallel-size {config.tensor_model_parallel_size} does not divide the "
                f"{config.num_query_groups} key-value heads of the rollout model. Use a smaller one."
            )
        shape = CacheShape(config.num_layers, options.page_size, kv_heads, config.kv_channels, weight.dtype)
        slots = options.max_running_requests
        pages = num_pages(shape, slots, options.max_length, options.kv_cache_bytes)
        self.cache = BlockKVCache(shape, pages, self.device)
        self.attention = backend(options.attention_backend, shape, self.device)
        self.logit_shift = model.logit_shift
        self.scheduler = Scheduler(
            slots,
            pages,
            options.page_size,
            options.max_tokens_per_pass,
            options.full_attention,
            self.logit_shift,
            options.share_prompts,
            options.fuse_commit,
            options.longest_first,
        )
        self.batch = RunningBatch(slots, options.max_length, vocabulary.mask_id, self.device)
        widest = -(-options.max_length // options.page_size)
        self.page_table = torch.zeros((slots + 1, widest), dtype=torch.int64, device=self.device)
        self.page_table[self.batch.spare] = self.cache.scratch
        self.denoiser = Denoiser(self.batch, vocabulary, self.tp_group, options.fused_sampler)
        self.graphs = graphs_for(options, self._forward, partial(self._decide_round, None))
        self._check_graphs()
        self.weight_version = 0
        self._version = torch.zeros((), dtype=torch.int64, device=self.device)  # the same, where kernels read it
        self.stats = EngineStats()

    # Requests -------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do, here and on the ranks that share experts. Collective over these."""
        busy = bool(self.scheduler.waiting or self.scheduler.running)
        if self.expert_group is not None:
            anywhere = torch.tensor(int(busy), device=self.device)
            dist.all_reduce(anywhere, dist.ReduceOp.MAX, self.expert_group)
            busy = bool(anywhere)
        return not busy

    @property
    def vacancies(self) -> int:
        """About how many more requests would start at once: as far as slots reach, and pages for texts half as long as
        they may get. Below 0 where more than these wait already.
        """
        half = -(-self.options.max_length // (2 * self.options.page_size))
        return self.scheduler.vacancies(half)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
            DataError: a request that can never run; none is queued then.
        """
        requests = list(requests)
        for request in requests:
            check(request, self.options.max_length, self.options.full_attention)
            pages = self.scheduler.most_pages(request)
            if pages > self.cache.pages:
                raise DataError(
                    f"Prompt {request.prompt_key} needs {pages} pages of the KV cache, which has {self.cache.pages}. "
                    "Give the cache more memory, or shorten the prompt or the response."
                )
        self.scheduler.submit(requests)

    def run(self, requests: Iterable[Request]) -> list[Trace]:
        """Submit and step until all are done; traces in order of completion."""
        self.submit(requests)
        traces: list[Trace] = []
        while not self.idle:
            traces += self.step()
        return traces

    def abort(self, keys: Iterable[tuple[str, int]] | None = None) -> list[Trace]:
        """Stop responses.

        Args:
            keys: (prompt key, sample) of those to stop; None stops all.

        Returns:
            For each that was running its finished blocks, and for one that waited and had been begun before what it had
            then ('abort'): a Request with it as `partial` goes on from there. Others that waited are forgotten.
        """
        stopped = None if keys is None else set(keys)
        wanted = lambda request: stopped is None or (request.prompt_key, request.sample) in stopped
        waiting = [request.partial for request in self.scheduler.take_waiting(wanted) if request.partial is not None]
        running = [one for one in self.scheduler.running.values() if wanted(one.request)]
        ends = [max(one.start, len(one.request.prompt_ids)) for one in running]
        traces = self.batch.traces(running, ends, ["abort"] * len(running)) if running else []
        for one in running:
            self.scheduler.finish(one)
        return waiting + traces

    # Memory ---------------------------------------------------------------------------------------------------------

    def drop_cache(self) -> None:
        """Forget all keys and values, because the weights have changed; running sequences compute theirs again."""
        self.batch.restart_block(self.scheduler.drop_cache())
        self._check_graphs()

    def sleep(self) -> None:
        """Give the KV cache's memory back. Sequences that are running compute their keys again when it is taken anew,
        by the next `step`.
        """
        self.drop_cache()
        self.cache.sleep()
        self._check_graphs()

    def wake(self) -> None:
        """Take the KV cache's memory; nothing changes if it is there."""
        if self.cache.asleep:
            self.cache.wake()
            self._check_graphs()

    def _check_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.keep_at([*self.model.parameters(), *self.model.buffers(), self.cache.storage])

    @property
    def kv_cache_bytes(self) -> int:
        """Memory that the KV cache takes now."""
        return self.cache.nbytes

    # Passes ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Trace]:
        """One pass: the running sequences that fit into it take one denoising step each, prompts come a chunk nearer.
        Or, where nothing is to be decided in between, `rounds_per_sync` of them.

        Returns: the responses that it completed.
        """
        self.wake()
        if self.options.rounds_per_sync > 1 and self.expert_group is None:
            sequences = self.scheduler.for_rounds(self.options.rounds_per_sync)
            if sequences is not None:
                return self._rounds(sequences)
        with self.stats.phase("schedule"):
            plan = self.scheduler.plan()
            self._prepare(plan)
        if not plan.spans:
            self._lend_experts()
            return []
        with self.stats.phase("schedule"):
            slot = torch.tensor([span.slot for span in plan.spans], device=self.device)
            queries = self._queries(plan.spans, slot)
        self._count(plan)
        denoised = [index for index, span in enumerate(plan.spans) if span.denoise]
        self._denoise(slot, queries, torch.tensor(denoised, dtype=torch.int64, device=self.device))
        return self._collect([plan.spans[index] for index in denoised], slot[denoised])

    def _prepare(self, plan: Plan) -> None:
        """Bring tables and cache to the state in which the pass was planned."""
        self.batch.admit(plan.starts)
        self.batch.forget_filters(self.scheduler.running.values())
        self.batch.restart_block(plan.restarts)
        self.cache.copy(plan.copies)
        self._set_page_tables(plan.tables)

    def _set_page_tables(self, tables: Mapping[int, list[int]]) -> None:
        """By slot."""
        if tables:
            width = max(map(len, tables.values()))
            rows = [[*pages, *[0] * (width - len(pages))] for pages in tables.values()]
            self.page_table[torch.tensor(list(tables), device=self.device), :width] = torch.tensor(
                rows, device=self.device
            )

    def _queries(self, spans: list[Span], slot: Tensor) -> Queries:
        blocks = None
        if not self.options.full_attention:
            blocks = [self.scheduler.running[span.slot].request.sampling.block_size for span in spans]
        return Queries.of(spans, blocks, self.page_table, slot, self.options.page_size)

    def _lend_experts(self) -> None:
        """Take part in a pass of the replicas that use this rank's experts, with one token of no sequence."""
        if self.expert_group is None:
            return
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        nothing = zero[:0]
        alone = Queries(self.page_table[:1], self.options.page_size, [1], [1], zero, zero, zero + 1, nothing, nothing)
        self._forward(zero, alone, zero)

    def _denoise(self, slot: Tensor, queries: Queries, denoised: Tensor) -> None:
        """The pass, the draw at every masked position, and the unmasking.

        Args:
            slot: int64 [n], of the spans. denoised: int64, the spans that take a denoising step.
        """
        batch, stats = self.batch, self.stats
        with stats.phase("model"):
            token_slot, position = slot[queries.sequence], queries.position
            read = self._read(token_slot, position, queries.sequence, denoised)
            logits = self._forward(batch.tokens[token_slot, position], queries, read - self.logit_shift)
        if not len(read):
            return
        with stats.phase("sample"):
            stats.head_tokens += len(read)
            self.denoiser.step(logits, slot, queries.sequence[read], position[read], self.weight_version)

    def _read(self, token_slot: Tensor, position: Tensor, sequence: Tensor, denoised: Tensor) -> Tensor:
        """The tokens of the pass that may be unmasked now: in the current block of a span that denoises. int64 [N]."""
        batch = self.batch
        wanted = (position >= batch.start[token_slot]) & (position < batch.block_end[token_slot])
        wanted &= position >= self.logit_shift  # the first token of a text has none before it, and is known
        if self.options.masked_head:
            wanted &= ~batch.known[token_slot, position]
        is_denoised = torch.zeros(int(sequence[-1]) + 1, dtype=torch.bool, device=self.device)
        is_denoised[denoised] = True
        return torch.nonzero(wanted & is_denoised[sequence])[:, 0]

    def _rounds(self, sequences: list[Sequence]) -> list[Trace]:
        """Some passes of the same sequences; the host looks at what became of them at the end."""
        stats, slots = self.stats, [one.slot for one in sequences]
        with stats.phase("schedule"):
            self._set_page_tables({one.slot: one.pages for one in sequences})
            pages, width = max(len(one.pages) for one in sequences), None
            if self.graphs is not None:  # few shapes
                pages, width = min(2 ** (pages - 1).bit_length(), self.page_table.shape[1]), width_for(len(sequences))
            size = self.options.page_size
            rounds = Rounds(self.batch, self.page_table, size, self.cache.scratch, sequences, pages * size, width)
            self.batch.forget_filters(sequences)
            self._version.fill_(self.weight_version)
            rounds, one_round = self._maker(rounds)
        for _ in range(self.options.rounds_per_sync):
            one_round()
        with stats.phase("collect"):
            finished = []
            standings, steps, committed = rounds.outcome()
            for one, (progress, end, *standing) in zip(sequences, standings):
                self.scheduler.after_rounds(one, *standing)
                if progress in _FINISHED:
                    finished.append((one, end, _FINISHED[progress]))
            traces = self._hand_out(finished)
        stats.passes += self.options.rounds_per_sync
        stats.denoising_steps += steps
        stats.forwards += steps
        stats.denoise_tokens += steps * rounds.block
        stats.commit_tokens += committed * rounds.block
        stats.head_tokens += len(slots) * rounds.block * self.options.rounds_per_sync
        return traces

    def _maker(self, rounds: Rounds) -> tuple[Rounds, Callable[[], object]]:
        """The rounds to look at, and what makes one of them."""
        if isinstance(self.graphs, GraphedRounds):
            batch = self.batch  # its stop tokens and widest block have other shapes when they grow
            rounds, again = self.graphs(rounds, batch.widest_block, batch.stops.shape[1], int(batch.filters))
            return rounds, partial(self._in_phase, "model", again)
        rules = self.denoiser.rules(rounds.slot.repeat_interleave(rounds.block))
        forward = partial(self._in_phase, "model", self.graphs or self._forward)
        decide = partial(self._in_phase, "sample", partial(self._decide_round, rules))
        return rounds, partial(rounds.round, forward, decide)

    def _in_phase(self, name: str, work: Callable[..., Tensor | None], *given: object) -> Tensor | None:
        with self.stats.phase(name):
            return work(*given)

    def _forward(self, tokens: Tensor, queries: Queries, slots: Tensor) -> Tensor:
        """Logits [N, V / TP] at the slots of a pass."""
        attention = self.attention(self.cache, queries)
        return self.model.forward_tokens(tokens, RowParams(position=queries.position, slots=slots, attention=attention))

    def _decide_round(
        self, rules: Rules | None, logits: Tensor, slot: Tensor, position: Tensor, masked: Tensor
    ) -> None:
        self.denoiser.step_blocks(logits, slot, position, masked, self._version, rules)

    def _collect(self, spans: list[Span], slot: Tensor) -> list[Trace]:
        """Count the step; move finished blocks on; hand out finished responses."""
        if not spans:
            return []
        with self.stats.phase("collect"):
            finished = []
            for span, (progress, end) in zip(spans, self.batch.advance(slot).tolist()):
                sequence = self.scheduler.running[span.slot]
                self.scheduler.stepped(sequence, progress == Progress.NEXT_BLOCK)
                if progress in _FINISHED:
                    finished.append((sequence, end, _FINISHED[progress]))
            return self._hand_out(finished)

    def _hand_out(self, finished: list[tuple[Sequence, int, str]]) -> list[Trace]:
        """The traces of sequences, each with the end of its response and the reason; they are let go."""
        if not finished:
            return []
        traces = self.batch.traces(*zip(*finished))
        for sequence, _, _ in finished:
            self.scheduler.finish(sequence)
        self.stats.finished += len(traces)
        self.stats.response_tokens += sum(len(trace.response_ids) for trace in traces)
        return traces

    def _count(self, plan: Plan) -> None:
        stats = self.stats
        stats.passes += 1
        for span in plan.spans:
            current = max(span.end - max(span.start, span.first), 0)
            before = span.end - span.first - current
            stats.denoise_tokens += current
            stats.commit_tokens += before if span.commit else 0
            stats.prefill_tokens += 0 if span.commit else before
            stats.denoising_steps += span.denoise
            stats.forwards += span.denoise or span.commit
        commits_only = [span.slot for span in plan.spans if span.commit and not span.denoise]
        if commits_only:
            self.batch.forwards[torch.tensor(commits_only, device=self.device)] += 1
        preemptions, shared = self.scheduler.take_counts()
        stats.preemptions += preemptions
        stats.shared_tokens += shared
