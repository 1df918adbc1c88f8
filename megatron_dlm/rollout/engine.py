"""The rollout engine: submit requests, step, receive traces.

Sequences at different blocks and denoising steps share every pass. A pass gives each sequence the tokens whose final
keys are not in the cache yet (the prompt's full blocks at first, later the block that was just finished) together with
the block being denoised; under the visibility rule that is exact, so neither prefill nor the commit of a block costs a
pass of its own, and the terminal block is never committed. The head and the softmax see masked positions only.

A sequence's `num_forwards` counts the passes that denoised it and the passes that only committed a block, not prefill.
Here a commit always rides on the next denoising step, so it equals the number of denoising steps (but for an aborted
response: the steps of its dropped block were forwards too).

The result is a function of the weights and of each request's key: not of the batch, of the order of submission, of the
token limit of a pass, or of the number of replicas (in floating point, up to the rounding of the matrix products;
docs/architecture.md).

    engine.submit(requests)
    while not engine.idle:
        traces += engine.step()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.diffusion.sampling import Draws, draw
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.diffusion.unmasking import scheduled_count, select
from megatron_dlm.model.block_diffusion import BlockDiffusionModel
from megatron_dlm.model.policy import Vocabulary, log_normaliser, policy_scores
from megatron_dlm.model.row_params import RowParams
from megatron_dlm.rollout.batch import RunningBatch
from megatron_dlm.rollout.kv_cache import BlockKVCache, CachedAttention, Ragged
from megatron_dlm.rollout.request import Request, check

_TABLE_BYTES = 2**28  # of one [rows, V] table in float64


class Engine:
    """Generates responses with a model that holds all layers on this rank (tensor-parallel at most).

    All ranks of the tensor-parallel group make the same calls with the same requests, and hold the same state: each
    draws from the same gathered policy with the same keys, and takes every decision from that. Replicas that share
    experts make their passes together: each calls `step` until `idle`, which is then the same for all of them.

    Args:
        model: a chunk with both ends of the pipeline. Its weights are read at each pass, so an update is seen at once;
            but running sequences keep the keys that older weights wrote, so update between rollouts or abort first.
        vocabulary: what the policy ranges over.
        max_running_requests: sequences in flight.
        max_length: longest text, prompt and terminal block included.
        max_tokens_per_pass: sequences that would make a pass larger wait for the next one; a single one always runs.

    Attributes:
        weight_version: recorded with each token that is unmasked from now on; whoever changes the weights raises it.

    Raises:
        ConfigError: the model is only a part of a pipeline, or its key-value heads cannot be divided.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        vocabulary: Vocabulary,
        max_running_requests: int,
        max_length: int,
        max_tokens_per_pass: int = 8192,
    ) -> None:
        if not (model.pre_process and model.post_process):
            raise ConfigError(
                "The rollout engine needs all layers on one rank. Build the rollout model with pipeline size 1."
            )
        self.model = model
        self.vocabulary = vocabulary
        self.tp_group = model.pg_collection.tp if dist.get_world_size(model.pg_collection.tp) > 1 else None
        config, weight = model.config, model.embedding.word_embeddings.weight
        experts = model.pg_collection.tp_ep if config.num_moe_experts is not None else None
        self.expert_group = experts if experts is not None and dist.get_world_size(experts) > 1 else None
        self.device = weight.device
        kv_heads = config.num_query_groups // config.tensor_model_parallel_size
        if kv_heads * config.tensor_model_parallel_size != config.num_query_groups:
            raise ConfigError(
                f"--tensor-model-parallel-size {config.tensor_model_parallel_size} does not divide the "
                f"{config.num_query_groups} key-value heads of the rollout model. Use a smaller one."
            )
        self.cache = BlockKVCache(
            max_running_requests, max_length, config.num_layers, kv_heads, config.kv_channels, weight.dtype, self.device
        )
        self.batch = RunningBatch(max_running_requests, max_length, vocabulary.mask_id, self.device)
        self.max_tokens_per_pass = max_tokens_per_pass
        self.waiting: deque[Request] = deque()
        self.turns: deque[int] = deque()  # the running slots; those whose last pass is longest ago come first
        self.weight_version = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do, here and on the ranks that share experts. Collective over these."""
        busy = bool(self.waiting or self.turns)
        if self.expert_group is not None:
            anywhere = torch.tensor(int(busy), device=self.device)
            dist.all_reduce(anywhere, dist.ReduceOp.MAX, self.expert_group)
            busy = bool(anywhere)
        return not busy

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
            DataError: a request that can never run; none is queued then.
        """
        requests = list(requests)
        for request in requests:
            check(request, self.cache.max_length)
        self.waiting.extend(requests)

    def abort(self) -> list[Trace]:
        """Stop everything: waiting requests are forgotten, running ones return their finished blocks ('abort')."""
        self.waiting.clear()
        traces = []
        for slot in sorted(self.turns):
            end = max(int(self.batch.start[slot]), int(self.batch.prompt_length[slot]))
            # The block in progress is dropped: a trace ends with a complete block.
            self.batch.start[slot] -= self.batch.block_size[slot]
            traces.append(self.batch.trace(slot, end, "abort"))
            self.batch.release(slot)
        self.turns.clear()
        return traces

    @torch.no_grad()
    def step(self) -> list[Trace]:
        """One pass: the running sequences that fit into it take one denoising step each.

        Returns: the responses that it completed.
        """
        while self.waiting and self.batch.free:
            self.turns.append(self.batch.admit(self.waiting.popleft()))
        if not self.turns:
            self._lend_experts()
            return []
        slot = self._next_in_turn()
        self._denoise(slot)
        traces = self._advance(slot)
        self.turns.extend(one for one in slot.tolist() if self.batch.request[one] is not None)
        return traces

    def _lend_experts(self) -> None:
        """Take part in a pass of the replicas that use this rank's experts, with one token of no sequence."""
        if self.expert_group is None:
            return
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        alone = CachedAttention(self.cache, Ragged(zero, [1], zero, zero, zero + 1, [1]))  # writes to a free slot
        self.model.forward_tokens(zero, RowParams(position=zero, slots=zero, attention=alone))

    def _next_in_turn(self) -> Tensor:
        """Take from `turns` the slots of this pass, int64 [n]: as many as the token limit allows, and at least one."""
        counts = self.batch.num_queries(torch.tensor(self.turns, device=self.device))
        fitting = int((counts.cumsum(0) <= self.max_tokens_per_pass).sum())
        taken = [self.turns.popleft() for _ in range(max(fitting, 1))]
        return torch.tensor(taken, device=self.device)

    def run(self, requests: Iterable[Request]) -> list[Trace]:
        """Submit and step until all are done; traces in order of completion."""
        self.submit(requests)
        traces: list[Trace] = []
        while not self.idle:
            traces += self.step()
        return traces

    def _denoise(self, slot: Tensor) -> None:
        """The pass, the draw at every masked position, and the unmasking."""
        batch, ragged = self.batch, self.batch.ragged(slot)
        token_slot = slot[ragged.sequence]
        tokens = batch.tokens[token_slot, ragged.position]
        masked = torch.nonzero(~batch.known[token_slot, ragged.position])[:, 0]  # [N], all in the current blocks
        params = RowParams(position=ragged.position, slots=masked, attention=CachedAttention(self.cache, ragged))
        logits = self.model.forward_tokens(tokens, params)  # [N, V / TP]
        where, position = token_slot[masked], ragged.position[masked]
        draws = self._draw(logits, where, position)
        chosen = self._select(slot, ragged.sequence[masked], position - batch.start[where], draws.confidence)
        where, position = where[chosen], position[chosen]
        batch.tokens[where, position] = draws.token[chosen]
        batch.known[where, position] = True
        batch.step[where, position] = batch.steps_taken[where] + 1
        batch.logprob[where, position] = draws.logprob[chosen].double()
        batch.sampling_logprob[where, position] = draws.sampling_logprob[chosen].double()
        batch.version[where, position] = self.weight_version

    def _draw(self, logits: Tensor, where: Tensor, position: Tensor) -> Draws:
        """One token for each of the N masked positions, in parts: each makes several float64 tables of its size.

        Args:
            logits: [N, V / TP].
            where, position: int64 [N], slots and positions in the text.
        """
        batch, parts = self.batch, []
        rows = max(1, _TABLE_BYTES // (8 * self.model.vocab_size))
        for logits_part, slot, place in zip(logits.split(rows), where.split(rows), position.split(rows)):
            uniform = uniforms(batch.stream[slot], place, batch.steps_taken[slot])
            policy = self._policy(logits_part, batch.temperature[slot])
            parts.append(draw(policy, uniform, batch.greedy[slot], batch.top_k[slot], batch.top_p[slot]))
        return Draws(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Draws)))

    def _policy(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """Log-probabilities over the whole vocabulary, [N, V]."""
        scores = policy_scores(logits, temperature, self.vocabulary, self.tp_group)
        policy = scores - log_normaliser(scores, self.tp_group)[:, None]
        if self.tp_group is None:
            return policy
        shards = [torch.empty_like(policy) for _ in range(dist.get_world_size(self.tp_group))]
        dist.all_gather(shards, policy.contiguous(), group=self.tp_group)
        return torch.cat(shards, dim=-1)

    def _select(self, slot: Tensor, sequence: Tensor, column: Tensor, confidence: Tensor) -> Tensor:
        """Which of the N masked positions to unmask, bool [N].

        Args:
            slot: int64 [n], the slots of the pass.
            sequence, column: int64 [N], where the positions stand in a table of the n blocks.
            confidence: [N].
        """
        batch = self.batch
        block_size, denoising_steps = batch.block_size[slot], batch.denoising_steps[slot]
        taken = batch.block_steps[slot]
        shape = (len(slot), int(block_size.max()))
        table = torch.zeros(shape, dtype=torch.float64, device=self.device)
        table[sequence, column] = confidence.double()
        masked = torch.zeros(shape, dtype=torch.bool, device=self.device)
        masked[sequence, column] = True
        count = scheduled_count(block_size, denoising_steps, taken)
        chosen = select(
            batch.remasking[slot], table, masked, count, batch.threshold[slot], taken + 1 >= denoising_steps
        )
        return chosen[sequence, column]

    def _advance(self, slot: Tensor) -> list[Trace]:
        """Count the step; move finished blocks on; hand out finished responses."""
        batch = self.batch
        batch.steps_taken[slot] += 1
        batch.block_steps[slot] += 1
        batch.forwards[slot] += 1
        batch.cached[slot] = batch.start[slot]  # the pass stored everything before the current block in its final form
        end = batch.start[slot] + batch.block_size[slot]
        column = torch.arange(int(batch.block_size[slot].max()), device=self.device)
        position = batch.start[slot][:, None] + column
        inside = position < end[:, None]
        position = position.clamp(max=self.cache.max_length - 1)
        done = torch.nonzero((batch.known[slot[:, None], position] | ~inside).all(1))[:, 0]
        traces, going_on = [], []
        finished, blocks = slot[done], batch.tokens[slot[done, None], position[done]]
        # The host reads what it needs of all finished blocks at once: on a GPU each reading waits for the device.
        for one, start, tokens in zip(finished.tolist(), batch.start[finished].tolist(), blocks.tolist()):
            response_end, reason = self._response_end(batch.request[one], start, tokens)
            if reason is not None:
                traces.append(batch.trace(one, response_end, reason))
                batch.release(one)
            else:
                going_on.append(one)
        if going_on:
            moved = torch.tensor(going_on, device=self.device)
            batch.start[moved] += batch.block_size[moved]
            batch.block_steps[moved] = 0
        return traces

    @staticmethod
    def _response_end(request: Request, start: int, tokens: list[int]) -> tuple[int, str | None]:
        """Where a response ends if it ends in the block just finished, and why; reason None if it goes on.

        Args:
            start: first position of the block.
            tokens: its tokens; anything after them.
        """
        sampling, prompt = request.sampling, len(request.prompt_ids)
        limit, block_end = prompt + sampling.max_new_tokens, start + sampling.block_size
        first = max(start, prompt)
        if not sampling.ignore_eos:
            for offset, token in enumerate(tokens[first - start : min(block_end, limit) - start]):
                if token in sampling.stop_token_ids:
                    return first + offset + 1, "stop"
        return (limit, "length") if block_end >= limit else (block_end, None)
