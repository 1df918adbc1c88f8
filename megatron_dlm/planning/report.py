"""A plan as text, and as plain data for a file."""

from __future__ import annotations

from typing import Any

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.planning.cost import StepCost, step_cost
from megatron_dlm.planning.hardware import Hardware
from megatron_dlm.planning.job import Job
from megatron_dlm.planning.layout import Layout, Workload, lengths
from megatron_dlm.planning.memory import RankPlan
from megatron_dlm.planning.search import fullest, in_gib, recomputation


def layout_of(job: Job) -> Layout:
    """The layout as the cost model has it."""
    one = job.parallel
    return Layout(
        world=job.world_size,
        tp=one.tensor_model_parallel_size,
        pp=one.pipeline_model_parallel_size,
        cp=one.context_parallel_size,
        ep=one.expert_model_parallel_size,
        etp=one.expert_tensor_parallel_size,
        vpp=one.num_virtual_stages_per_pipeline_rank or 1,
        sequence_parallel=one.sequence_parallel,
        distributed_optimizer=one.use_distributed_optimizer,
        overlap=one.overlap_grad_reduce,
        recompute=recomputation(job)[0] or "none",
        rollout_tp=None if job.rollout is None else job.rollout.rollout_tensor_model_parallel_size,
    )


def workload_of(job: Job) -> Workload:
    """A step as the cost model has it."""
    texts, model = job.texts, job.model
    common = dict(
        prompt_length=texts.prompt,
        responses=lengths(texts.response, max(texts.response, texts.longest_response)),
        block_size=model.block_size or texts.longest_response,
        row_budget=job.row_budget,
        attention="dense" if job.dense_attention else "visible",
        itemsize=2 if model.bf16 else 4,
    )
    if job.rl is None:
        return Workload(
            prompts=job.responses, samples=1, steps_per_block=1.0, rollout=False, old_logprobs="current", **common
        )
    return Workload(
        prompts=job.rollout.rollout_batch_size,
        samples=job.samples,
        steps_per_block=job.texts.copies,
        updates=job.updates,
        old_logprobs=job.rl.old_logprobs,
        reference=job.has_reference,
        value_model=job.value_optimizer is not None,
        together=job.value_optimizer is not None,
        max_running=job.rollout.max_running_requests,
        **common,
    )


def cost_of(job: Job, hardware: Hardware, ranks: list[RankPlan]) -> tuple[StepCost | None, str]:
    """What a step costs, or why that is not known."""
    caches = [rank.engine.cache for rank in ranks if rank.engine is not None]
    try:
        return step_cost(job.model, layout_of(job), workload_of(job), hardware, min(caches) if caches else None), ""
    except ConfigError as error:
        return None, str(error)


def table(ranks: list[RankPlan]) -> list[str]:
    """Bytes of each distinct rank, in GiB."""
    engine = any(rank.engine is not None for rank in ranks)
    head = ["ranks", "first", "tensor", "stage", "expert", "params M", "weights", "grads", "optimizer", "in flight"]
    head += ["activations", "head"] + (["engine's", "kv cache", "responses", "refit in", "refit out"] if engine else [])
    head += ["peak", "phase"]
    lines = [head]
    for rank in ranks:
        models = rank.built.models.values()
        policy, place = rank.built.activations["policy"], rank.place
        phase, peak = rank.peak
        line = [
            f"{place.alike}",
            f"{place.rank}",
            f"{place.tensor}",
            f"{place.stage}",
            f"{place.expert}",
            f"{sum(model.count for model in models) / 1e6:,.1f}",
            in_gib(sum(model.parameters for model in models)),
            in_gib(sum(model.gradients for model in models)),
            in_gib(sum(model.optimizer for model in models)),
            "+".join(map(str, rank.in_flight)),
            in_gib(rank.activations),
            in_gib(policy.head),
        ]
        if engine:
            one, moved = rank.engine, rank.traffic
            line += [
                "-" if moved is None else in_gib(moved.own),
                "-" if one is None else in_gib(one.cache),
                "-" if one is None else f"{one.responses:,}",
                "-" if moved is None else in_gib(moved.received),
                "-" if moved is None else in_gib(moved.sent),
            ]
        lines.append([*line, in_gib(peak), phase])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) for line in lines]


def phases(rank: RankPlan) -> list[str]:
    """Who holds what in each phase, on one rank."""
    return [
        f"  {name}: {in_gib(sum(held.values()))} GiB = "
        + " + ".join(f"{holder} {in_gib(nbytes)}" for holder, nbytes in held.items() if nbytes)
        for name, held in rank.phases.items()
    ]


def seconds(cost: StepCost, hardware: Hardware) -> list[str]:
    """What a step takes, phase by phase."""
    lines = [
        f"  {name}: {phase.seconds:,.1f} s, {phase.flops / 1e12:,.1f} TFLOP and {phase.bytes / 1e9:,.1f} GB sent per "
        f"rank, mostly {phase.bound}"
        for name, phase in cost.phases.items()
    ]
    total = f"A step takes {cost.seconds:,.1f} s on {hardware.name} ({cost.flops / 1e12:,.1f} TFLOP per rank), by a "
    return [total + "model whose fractions of peak are assumptions (docs/scaling.md):", *lines]


def text(job: Job, ranks: list[RankPlan], hardware: Hardware, memory_bytes: int, cost: StepCost | None) -> list[str]:
    row, top = job.row, fullest(ranks)
    count = f"Distinct ranks: {len(ranks)} of {job.world_size:,}"
    lines = [
        f"{count}, in GiB; rows of {row.tokens:,} tokens and {row.targets:,} targets on a rank, {job.microbatches:,} "
        "per update:",
        *table(ranks),
        f"The fullest is rank {top.place.rank}, of {in_gib(memory_bytes)} GiB on {hardware.name}:",
        *phases(top),
    ]
    if top.engine is not None:
        per = top.engine.token
        lines.append(
            f"A token of the KV cache takes {per:,} bytes; full responses: {top.engine.responses:,} at a time."
        )
    if cost is not None:
        lines += seconds(cost, hardware)
    return lines


def data(job: Job, ranks: list[RankPlan], hardware: Hardware, memory_bytes: int, cost: StepCost | None) -> dict:
    """The figures, for --plan-json. Bytes, FLOPs and seconds."""
    return {
        "world_size": job.world_size,
        "hardware": hardware.name,
        "memory_bytes": memory_bytes,
        "row": {"tokens": job.row.tokens, "targets": job.row.targets, "microbatches": job.microbatches},
        "ranks": [_rank(rank) for rank in ranks],
        "step": None if cost is None else {name: _phase(phase) for name, phase in cost.phases.items()},
    }


def _rank(rank: RankPlan) -> dict[str, Any]:
    place, engine, traffic = rank.place, rank.engine, rank.traffic
    fields = lambda one, *names: None if one is None else {name: getattr(one, name) for name in names}
    return {
        **fields(place, "rank", "alike", "tensor", "stage", "expert", "expert_tensor", "engine", "engine_expert"),
        "models": {
            name: fields(model, "count", "parameters", "gradients", "optimizer")
            for name, model in rank.built.models.items()
        },
        "activations": {
            name: fields(found, "saved", "peak", "head", "shared", "boundary")
            for name, found in rank.built.activations.items()
        },
        "in_flight": rank.in_flight,
        "activations_in_flight": rank.activations,
        "refit": fields(traffic, "shared", "own", "received", "sent", "copied"),
        "kv_cache": fields(engine, "token", "cache", "responses", "work", "problem"),
        "phases": rank.phases,
        "peak": dict(zip(("phase", "bytes"), rank.peak)),
    }


def _phase(phase) -> dict[str, Any]:
    sent = {f"{collective} over {link}": nbytes for (collective, link), nbytes in phase.sent.items()}
    return {"seconds": phase.seconds, "flops": phase.flops, "sent": sent, "parts": dict(phase.parts)}
