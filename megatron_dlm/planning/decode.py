"""What generating takes: the roofline of a denoising pass, and engines that take prompts from a queue until the longest
response is done.

A pass gives each of S responses the tokens of its block, and once per block those of the block before, whose keys are
then stored (docs/architecture.md, 5). It multiplies with all matrices once, reads the keys and values of S contexts,
and makes logits at masked positions. Its least time is the sum of

    max(bytes of the matrices / memory bandwidth, FLOPs / FLOP/s)
    max(bytes of keys and values / memory bandwidth, FLOPs of attention / FLOP/s)
    bytes of activations and logits / memory bandwidth
    two all-reduces per layer over the tensor-parallel ranks, and what kernels take to start.

With weights in FP8 (--rollout-weights fp8) the matrices of the layers are one byte a number and multiply at that rate,
and their inputs are rounded, in one more pass over memory. Head, keys and values, and the rest are as ever.

(benchmarks/roofline.py is the same without activations, tensor parallelism and starts.)

Invariants (tests/planning/test_decode.py): every token that is asked for is generated; one engine with equal responses
takes passes x seconds of a pass; more engines are never slower.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

import numpy as np

from megatron_dlm.config.model import ModelConfig
from megatron_dlm.planning.hardware import Hardware
from megatron_dlm.planning.layout import Layout, Workload
from megatron_dlm.planning.phase import Phase, Tally
from megatron_dlm.planning.work import (
    LOGIT_BYTES,
    attention_flops,
    body_flops,
    head_flops,
    layer_traffic,
    padded_vocabulary,
    quantised_numbers,
    sizes_of,
)

_ENGINES = 64  # a job of more engines is simulated as one of so many, with as many prompts for each


def cache_bytes(model: ModelConfig, itemsize: int) -> float:
    """Of a token's keys and values in all layers."""
    return 2.0 * model.num_layers * model.num_query_groups * model.kv_channels * itemsize


def experts_touched(model: ModelConfig, tokens: float) -> float:
    """Share of the experts that some of so many tokens go to, if each goes to `moe_router_topk` at random."""
    if model.num_experts is None:
        return 1.0
    return 1.0 - (1.0 - model.moe_router_topk / model.num_experts) ** max(tokens, 1.0)


def cost_of_a_pass(
    model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware, running: float, context: float
) -> Tally:
    """One denoising pass of an engine, per rank of its `engine_tp`.

    Args:
        running: responses in flight. context: tokens before the block, on average.
    """
    tp, item, sizes = layout.engine_tp, workload.itemsize, sizes_of(model)
    block, steps = workload.block_size, workload.steps_per_block
    tokens = running * block * (1 + 1 / steps)
    masked = running * block * (steps + 1) / (2 * steps)
    memory = hardware.memory_bandwidth * hardware.bandwidth_fraction
    tally = Tally()
    body, head = body_flops(model, tokens) / tp, head_flops(model, masked) / tp
    layers = sizes.dense + sizes.experts * experts_touched(model, tokens)
    table = padded_vocabulary(model) * model.hidden_size
    weights = (layers * (1 if layout.rollout_fp8 else item) + table * item) / tp / memory
    computed = _product_seconds(layout, hardware, body, head)
    tally.add("weights" if weights > computed else "products", max(weights, computed))
    scores = attention_flops(model, tokens * (context + block)) / tp
    tally.add(
        "keys and values",
        max(
            running * context * cache_bytes(model, item) / tp / memory,
            scores / (hardware.bf16_flops * hardware.attention_fraction),
        ),
    )
    wide, rest = layer_traffic(model, item)
    if layout.rollout_fp8:
        whole, split = quantised_numbers(model)[0]
        wide, rest = wide + whole * (item + 1), rest + split * (item + 1)
    activations = tokens * model.num_layers * (wide + rest / tp)
    logits = masked * padded_vocabulary(model) * LOGIT_BYTES / tp
    tally.add("memory", (activations + logits) / memory)
    if tp > 1:
        sent = 2 * model.num_layers * 2 * (tp - 1) / tp * tokens * model.hidden_size * item
        tally.send("tensor", hardware.link(tp), sent, 2 * model.num_layers)
    tally.add("starts", model.num_layers * hardware.layer_seconds + hardware.pass_seconds)
    tally.flops = body + head + scores
    return tally


def _product_seconds(layout: Layout, hardware: Hardware, body: float, head: float = 0.0) -> float:
    """Of so many FLOPs with the matrices of the layers, and with the head's.

    Raises:
        ConfigError: they are in FP8, which the hardware does not have.
    """
    plain = hardware.bf16_flops * hardware.matmul_fraction
    if not layout.rollout_fp8:
        return (body + head) / plain
    return body / hardware.fp8_rate() + head / plain


def prefill(model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware) -> Tally:
    """A prompt, computed once for all of its responses."""
    shared, tp = workload.prompt_length, layout.engine_tp
    tally = Tally()
    products, scores = body_flops(model, shared) / tp, attention_flops(model, shared**2 / 2) / tp
    tally.add("prompts", _product_seconds(layout, hardware, products))
    tally.add("prompts", scores / (hardware.bf16_flops * hardware.attention_fraction))
    tally.flops = products + scores
    return tally


@dataclass(slots=True)
class _Engine:
    """One engine on its way. `progress` is what a response would have that runs since the start; `ends` the progress
    at which responses end, a heap of (end, begin).
    """

    lane: int
    clock: float = 0.0
    progress: float = 0.0
    begun: float = 0.0  # sum over running responses of the progress at which they began
    full: float = 0.0  # seconds so far with at least half of the largest number in flight
    ends: list[tuple[float, float]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


def room_for(layout: Layout, workload: Workload, model: ModelConfig, kv_bytes: float | None) -> int:
    """Responses that an engine works on at once: as many as allowed, and as its cache holds at their mean length (the
    prompt's share counted with each). At least 1.

    Args:
        kv_bytes: of a rank's cache; None is enough.
    """
    if kv_bytes is None:
        return workload.max_running
    each = workload.mean_response + workload.prompt_length / workload.samples
    fit = kv_bytes * layout.engine_tp / (cache_bytes(model, workload.itemsize) * each)
    return max(1, min(workload.max_running, int(fit)))


def rollout_cost(
    model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware, kv_bytes: float | None = None
) -> Phase:
    """All responses of a step: the time of the slowest engine, with how evenly the others are done among the facts.

    Between two events (a response ends) an engine's batch is fixed and all of it gains `block / steps` tokens per pass;
    so a step is simulated in as many events as responses. Prompts are dealt evenly to the engines' lanes; who has
    nothing left takes from the longest lane (rollout/queue.py). A prompt brings all its responses; where these do not
    fit together, the engine takes it as soon as nothing else runs, and they take turns.
    """
    engines = min(layout.engines, _ENGINES)
    prompts = max(1, round(workload.prompts * engines / layout.engines))
    room = room_for(layout, workload, model, kv_bytes)
    rng = np.random.default_rng(workload.seed)
    every = np.tile(np.array(workload.responses), -(-prompts * workload.samples // len(workload.responses)))
    drawn = rng.permutation(every)[: prompts * workload.samples].reshape(prompts, workload.samples)
    lanes = [list(range(lane, prompts, engines)) for lane in range(engines)]
    fleet = [_Engine(lane) for lane in range(engines)]
    waiting: list[list[float]] = [[] for _ in fleet]  # responses of prompts that an engine has taken
    one_prompt, longest_batch = prefill(model, layout, workload, hardware), 1
    passes_per_token = workload.steps_per_block / workload.block_size

    def take(engine: _Engine, help_others: bool = True) -> None:
        """Start what there is room for."""
        queue = waiting[engine.lane]
        while len(engine.ends) < room:
            if not queue:
                if engine.ends and len(engine.ends) + workload.samples > room:
                    return
                lane = lanes[engine.lane] or (max(lanes, key=len) if help_others else [])
                if not lane:
                    return
                queue.extend(drawn[lane.pop(0)].tolist())
                engine.clock += one_prompt.seconds
                engine.tally = engine.tally.plus(one_prompt)
            heapq.heappush(engine.ends, (engine.progress + queue.pop(), engine.progress))
            engine.begun += engine.progress

    for engine in fleet:  # a lane is open to others when its owner has taken from it
        take(engine, help_others=False)
    order = itertools.count()
    events = [(0.0, next(order), engine) for engine in fleet]
    while events:
        _, _, engine = heapq.heappop(events)
        while engine.ends and engine.ends[0][0] <= engine.progress + 1e-9:
            engine.begun -= heapq.heappop(engine.ends)[1]
        take(engine)
        running = len(engine.ends)
        if not running:
            continue
        longest_batch = max(longest_batch, running)
        gained = engine.ends[0][0] - engine.progress
        context = workload.prompt_length + engine.progress + gained / 2 - engine.begun / running
        one = cost_of_a_pass(model, layout, workload, hardware, running, context)
        passes = gained * passes_per_token
        engine.tally = engine.tally.plus(one.times(passes))
        engine.clock += one.seconds * passes
        engine.full += one.seconds * passes * (2 * running >= min(room, longest_batch))
        engine.progress += gained
        heapq.heappush(events, (engine.clock, next(order), engine))

    slowest = max(fleet, key=lambda engine: engine.clock)
    mean = sum(engine.clock for engine in fleet) / engines
    flops = sum(engine.tally.flops for engine in fleet) / engines
    return Phase(
        dict(slowest.tally.parts),
        flops,
        dict(slowest.tally.sent),
        {
            "room": room,
            "most in flight": longest_batch,
            "share of the slowest engine's time with half of that or more": slowest.full / slowest.clock,
            "mean over engines of their time, of the slowest": mean / slowest.clock,
            "prompts per engine": workload.prompts / layout.engines,
        },
    )
