"""The nearest settings that fit a device, tried in order of what they cost.

First what costs little time: the distributed optimizer, a smaller KV cache; then memory for computing again: selective
and full recomputation; then shorter rows; then more ranks for each row (context), layer (tensor) and model (pipeline).
`estimate` says without building anything whether a candidate has a chance; the first that has is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import flag_name
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.validate import check_parallel
from megatron_dlm.config.validate_rollout import check_rollout_layout
from megatron_dlm.planning.cost import parameters_of_a_rank
from megatron_dlm.planning.fit import activation_bytes, static_bytes
from megatron_dlm.planning.job import Job
from megatron_dlm.planning.memory import GIB, RankPlan, plan_memory
from megatron_dlm.planning.plain import layout_of, recomputation, workload_of
from megatron_dlm.planning.world import Place

LARGEST_TENSOR, LARGEST_CONTEXT, LARGEST_PIPELINE = 8, 8, 16
MOST_BUILT = 4  # candidates; each takes seconds
SLACK = 1.2  # candidates whose estimate is above the device's memory by no more are built


@dataclass(frozen=True, slots=True)
class Proposal:
    """Attributes: flags: to add to the command. peak: bytes of the fullest rank."""

    flags: str
    job: Job
    peak: int


def propose(job: Job, memory_bytes: int, say: Callable[[str], None] = lambda _: None) -> Proposal | None:
    """The first settings in order of cost that fit, found by estimate and made sure of by building.

    Returns: None where none does.
    """
    built = 0
    for candidate in candidates(job):
        flags = flags_of(job, candidate)
        if not flags or not possible(candidate):
            continue
        if estimate(candidate) > SLACK * memory_bytes:
            continue
        say(f"trying {flags}")
        peak = max(rank.peak[1] for rank in plan_memory(candidate, memory_bytes, only=_heaviest))
        if peak <= memory_bytes:
            return Proposal(flags, candidate, peak)
        built += 1
        if built >= MOST_BUILT:
            return None
    return None


def candidates(job: Job) -> Iterator[Job]:
    """Other settings for the same run, the cheapest first: each list of alternatives is tried for every setting of the
    dearer ones.
    """
    layout = job.parallel
    for pipeline in _doubled(layout.pipeline_model_parallel_size, LARGEST_PIPELINE):
        for tensor in _doubled(layout.tensor_model_parallel_size, LARGEST_TENSOR):
            for context in _doubled(layout.context_parallel_size, LARGEST_CONTEXT):
                for budget in _budgets(job):
                    for recompute in _recomputations(job):
                        for cache in _caches(job):
                            parallel = dataclasses.replace(
                                layout,
                                pipeline_model_parallel_size=pipeline,
                                tensor_model_parallel_size=tensor,
                                sequence_parallel=tensor > 1,
                                context_parallel_size=context,
                                use_distributed_optimizer=job.optimizer.optimizer == "adam",
                                **recompute,
                            )
                            yield job.changed(parallel=parallel, row_budget=budget, **cache)


def possible(job: Job) -> bool:
    """Whether a run would accept the layout."""
    try:
        check_parallel(job.parallel, job.model, job.world_size)
        if job.rollout is not None:
            check_rollout_layout(job.parallel, job.model, job.rollout, job.world_size)
    except ConfigError:
        return False
    return job.data_size >= 1


def estimate(job: Job) -> float:
    """Bytes of the fullest rank in training, by the formula of planning/fit.py. Rough: built ranks decide."""
    model, layout, workload = job.model, layout_of(job), workload_of(job)
    row = job.row.tokens * layout.cp
    teacher = parameters_of_a_rank(model, layout)[2] * workload.itemsize if job.has_teacher else 0.0
    held = static_bytes(model, layout, workload) + teacher
    return held + activation_bytes(model, layout, workload, row, job.microbatches)


def flags_of(before: Job, after: Job) -> str:
    """The flags that turn one job into the other."""
    told = []
    for field in dataclasses.fields(ParallelConfig):
        old, new = getattr(before.parallel, field.name), getattr(after.parallel, field.name)
        if old != new:
            flag = flag_name(field.name)
            told.append(f"{flag} {new}" if not isinstance(new, bool) else flag if new else f"--no-{flag[2:]}")
    if before.row_budget != after.row_budget:
        told.append(f"--max-tokens-per-row {after.row_budget}")
    if before.rl is not None and before.rl.offload_rollout != after.rl.offload_rollout:
        told.append("--offload-rollout")
    if before.rollout is not None and before.rollout.kv_cache_gib != after.rollout.kv_cache_gib:
        told.append(f"--kv-cache-gib {after.rollout.kv_cache_gib:g}")
    return " ".join(told)


def _heaviest(place: Place) -> bool:
    """Of ranks that differ in their tensor and expert parts only, the first."""
    return place.tensor == place.expert == place.expert_tensor == 0


def _doubled(size: int, most: int) -> Iterator[int]:
    yield size
    while size * 2 <= most:
        size *= 2
        yield size


def _budgets(job: Job) -> Iterator[int]:
    """The row budget and halves of it, as long as the longest text with one copy fits."""
    budget = job.row_budget
    yield budget
    while budget // 2 >= max(job.texts.largest, 64):
        budget //= 2
        yield budget


def _recomputations(job: Job) -> Iterator[dict[str, object]]:
    given, _ = recomputation(job)
    yield {}
    if given is None and hasattr(job.parallel, "recompute_granularity"):
        yield {"recompute_granularity": "selective"}
        yield {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif given == "selective" and job.parallel.recompute_granularity:
        yield {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "recompute_modules": None,
        }


def _caches(job: Job) -> Iterator[dict[str, object]]:
    """As it is; and with a KV cache that takes turns with training."""
    yield {}
    if job.rl is not None and not job.rl.offload_rollout:
        yield {"rl": dataclasses.replace(job.rl, offload_rollout=True)}


def fullest(ranks: list[RankPlan]) -> RankPlan:
    """The rank that has most at a time."""
    return max(ranks, key=lambda rank: rank.peak[1])


def in_gib(nbytes: float) -> str:
    return f"{nbytes / GIB:,.2f}"
