"""A plan as text, and as plain data for a file."""

from __future__ import annotations

from typing import Any

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.planning.cost import StepCost, step_cost
from megatron_dlm.planning.hardware import Hardware
from megatron_dlm.planning.head import head_bytes
from megatron_dlm.planning.job import Job
from megatron_dlm.planning.memory import RankPlan
from megatron_dlm.planning.plain import layout_of, workload_of
from megatron_dlm.planning.search import fullest, in_gib


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
            in_gib(sum(model.parameters + model.copies for model in models)),
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


def estimates(job: Job) -> list[str]:
    """What of a plan stands for kernels that run on a GPU only, and was neither built nor measured."""
    lines, precision, layers = [], job.precision, job.model.num_layers
    if precision.fused:
        count = sum(precision.in_fp8(layer, layers) for layer in range(layers))
        fp8 = f", {count} of {layers} in FP8 ({precision.recipe})" if count else ""
        lines.append(
            f"Layers of Transformer Engine{fp8}: what they keep is an estimate from the sources of Transformer Engine "
            "2.9 and megatron-core 0.16.1 (docs/planning.md)."
        )
    if job.triton_head:
        ours, plain = (f"{head_bytes(job, kernels) / 2**20:,.0f} MiB" for kernels in (True, False))
        where = " on the last pipeline stage" if job.stages > 1 else ""
        lines.append(
            f"The loss head takes {ours}{where} by Triton's kernels, as on a GPU that they work on (an estimate), and "
            f"{plain} with --loss-head torch."
        )
    if job.rollout is not None and job.rollout.rollout_weights == "fp8":
        lines.append(
            "Engines with weights in FP8: what their passes take is arithmetic with the data sheet's rate of FP8, and "
            "has not been measured (docs/planning.md)."
        )
    return lines


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
    lines += estimates(job)
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
            name: fields(model, "count", "parameters", "copies", "gradients", "optimizer")
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
