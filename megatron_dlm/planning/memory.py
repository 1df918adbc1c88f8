"""The memory of each distinct rank of a job: what it holds, phase by phase, and the most at a time.

`build` makes every distinct rank in turn (planning/world.py); `plan_memory` adds up what is there in which phase. Who
sleeps when is that of rl/turns.py: parameters of all models are always there, so are the engine's own weights; with
--offload-train gradients and optimizers only while their model is updated; the KV cache always, or with
--offload-rollout while responses are generated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import with_local_layers
from megatron_dlm.model.policy import Vocabulary
from megatron_dlm.model.shape import one_kernel_for_gates
from megatron_dlm.planning.attention import PlannedAttention
from megatron_dlm.planning.fused import Kernels
from megatron_dlm.planning.job import Job, chunks_in_flight
from megatron_dlm.planning.losses import loss_of_values, policy_loss
from megatron_dlm.planning.measure import ActivationBytes, StateBytes, activation_bytes, state_bytes, with_fp8
from megatron_dlm.planning.refit import Traffic, Weights, own_bytes, refit_traffic, weights_of
from megatron_dlm.planning.world import Place, as_rank, distinct_places, engine_sizes
from megatron_dlm.rollout.kv_cache import CacheShape, num_pages
from megatron_dlm.training.step import ForwardStep

GIB = 2**30
LARGE_PAGE = 256  # rollout/sizing.py
_OF_THE_SCHEDULE = (
    "lr_decay_style",
    "lr_decay_iters",
    "lr_wsd_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "lr_warmup_init",
)
TOKENS_PER_PASS = 8192  # of an engine on a GPU, rollout/sizing.py


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """One distinct rank, as built. `models`: policy, and value and reference if there are. `activations`: of those that
    are updated.
    """

    place: Place
    models: dict[str, StateBytes]
    activations: dict[str, ActivationBytes]
    weights: Weights | None


@dataclass(frozen=True, slots=True)
class EngineBytes:
    """The engine of one rank.

    Attributes:
        token: bytes of a token's keys and values. cache: bytes of the pages that the engine would take. responses: of
            full length, with prompts of full length, that these hold.
        work: what a pass takes beside weights and cache, estimated.
        problem: why the cache cannot be.
    """

    token: int
    cache: int
    responses: int
    work: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Attributes:
    activations: bytes of the policy's update: of all microbatches in flight, and the most beside them.
    in_flight: microbatches of each chunk.
    phases: name -> holder -> bytes.
    """

    place: Place
    built: BuiltRank
    in_flight: tuple[int, ...]
    activations: int
    traffic: Traffic | None
    engine: EngineBytes | None
    phases: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        return {name: sum(held.values()) for name, held in self.phases.items()}

    @property
    def peak(self) -> tuple[str, int]:
        """The phase in which most is there, and how much."""
        totals = self.totals
        name = max(totals, key=totals.__getitem__)
        return name, totals[name]


def plan_memory(
    job: Job, memory_bytes: int, devices_per_node: int = 8, only: Callable[[Place], bool] = lambda _: True
) -> list[RankPlan]:
    """The plan of each distinct rank.

    Args:
        memory_bytes: of a device, for this program.
        only: of the distinct places those that are built.

    Raises:
        ConfigError: as building the job in a run.
    """
    places = [place for place in distinct_places(job.parallel, job.world_size, job.rollout) if only(place)]
    built, measured = [], {}
    for place in places:
        built.append(build(job, place, measured))
    traffic = {}
    complete = job.rollout is not None and all(rank.weights is not None for rank in built)
    if complete and len(places) == len(distinct_places(job.parallel, job.world_size, job.rollout)):
        weights = {rank.place.key: (rank.place, rank.weights) for rank in built}
        traffic = refit_traffic(weights, job.parallel, job.rollout, job.world_size, devices_per_node)
    return [_rank_plan(job, rank, traffic.get(rank.place.key), memory_bytes) for rank in built]


def build(job: Job, place: Place, measured: dict) -> BuiltRank:
    """Build one rank. `measured`: activations of ranks whose chunks have the same shapes, filled in."""
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.rig import rollout_model
    from megatron_dlm.training.setup import Session

    vocabulary = Vocabulary(job.model.vocab_size, 0)
    with as_rank(place.rank, job.world_size, job.parallel) as groups:
        # Fused layers have the same weights, and can be built on a GPU only; planning/fused.py has what differs.
        plain = dataclasses.replace(with_local_layers(job.parallel), loss_head="torch", attention_backend="dense")
        session = Session(job.model, plain, None, groups, vocabulary)
        kernels = Kernels(job.precision, one_kernel_for_gates(job.model), job.triton_head)
        trained: list[tuple[str, OptimizerConfig, Callable, ForwardStep]] = [
            ("policy", job.optimizer, partial(session.train_state, lora=job.lora), policy_loss(job, vocabulary))
        ]
        if job.value_optimizer is not None:
            trained.append(("value", job.value_optimizer, session.value_state, loss_of_values))
        models, activations, weights = {}, {}, None
        for name, optimizer, make, loss in trained:
            state = make(_on_device(optimizer), 1)
            models[name] = _offloaded(with_fp8(state_bytes(state), state, job.precision, True), optimizer)
            shapes = tuple(tuple(tensor.shape) for _, tensor in state.named_parameters())
            key = (name, place.stage, shapes)
            if key not in measured:
                measured[key] = activation_bytes(state, job.row, PlannedAttention(job.kept), loss, kernels)
            activations[name] = measured[key]
            if name == "policy" and job.rollout is not None and job.rollout.rollout_backend == "native":
                rollout = rollout_groups(groups, *engine_sizes(job.parallel, job.rollout))
                engine = rollout_model(session, rollout, job.rollout.rollout_weights == "fp8")
                weights = weights_of(state, engine, job.precision)
            del state
        frozen = [name for name, there in (("reference", job.has_reference), ("teacher", job.has_teacher)) if there]
        for name in frozen:
            state = session.train_state(None, 1)
            models[name] = with_fp8(state_bytes(state), state, job.precision, False)
            del state
        return BuiltRank(place, models, activations, weights)


def _on_device(optimizer: OptimizerConfig) -> OptimizerConfig:
    """The same optimizer with all of its state on the device, and a schedule that fits a run of one step."""
    plain = {name: getattr(OptimizerConfig(), name) for name in _OF_THE_SCHEDULE}
    return dataclasses.replace(optimizer, optimizer_cpu_offload=False, **plain)


def _offloaded(found: StateBytes, optimizer: OptimizerConfig) -> StateBytes:
    """With --optimizer-cpu-offload a share of masters and moments is in host memory."""
    if not getattr(optimizer, "optimizer_cpu_offload", False):
        return found
    stays = 1 - getattr(optimizer, "optimizer_offload_fraction", 1.0)
    return dataclasses.replace(found, optimizer=round(found.optimizer * stays), moments=round(found.moments * stays))


def in_flight_bytes(found: ActivationBytes, counts: Iterable[int]) -> int:
    """Activations at the worst moment: those of all microbatches in flight, and what the newest one takes beside what
    it keeps.
    """
    counts = tuple(counts)
    kept = sum(count * saved for count, saved in zip(counts, found.saved, strict=True))
    received = max(counts) * found.boundary
    return kept + max(0, found.peak - max(found.saved)) + received + found.shared


def _rank_plan(job: Job, rank: BuiltRank, traffic: Traffic | None, memory_bytes: int) -> RankPlan:
    virtual = job.parallel.num_virtual_stages_per_pipeline_rank or 1
    flight = chunks_in_flight(rank.place.stage, job.stages, virtual, job.microbatches)
    always = {f"{name} parameters": model.parameters for name, model in rank.models.items()}
    always |= {f"{name} weights in FP8": model.copies for name, model in rank.models.items() if not model.training}
    sleeping = {
        name: {f"{name} gradients and optimizer": model.training, f"{name} weights in FP8": model.copies}
        for name, model in rank.models.items()
        if model.training
    }
    resting = {holder: nbytes for held in sleeping.values() for holder, nbytes in held.items()}
    activations = {name: in_flight_bytes(found, flight) for name, found in rank.activations.items()}
    phases: dict[str, dict[str, int]] = {}
    engine = None
    offload_train = job.rl is not None and job.rl.offload_train
    offload_rollout = job.rl is not None and job.rl.offload_rollout
    cache = {}
    if job.rollout is not None and rank.weights is not None:
        always["rollout weights of their own"] = own_bytes(rank.weights)
        opening = sum(always.values()) + (0 if offload_train and offload_rollout else sum(resting.values()))
        engine = _engine(job, memory_bytes - opening)
        cache = {"kv cache": engine.cache}
        phases["rollout"] = {**always, **({} if offload_train else resting), **cache, "engine's work": engine.work}
    for name, phase in (("policy", "train"), ("value", "train_value")):
        if name in activations:
            awake = sleeping[name] if offload_train else resting
            held = {} if offload_rollout else cache
            phases[phase] = {**always, **awake, **held, "activations": activations[name]}
    return RankPlan(rank.place, rank, flight, activations["policy"], traffic, engine, phases)


def _engine(job: Job, free: int) -> EngineBytes:
    """As rollout/sizing.py decides, from what is free when the engine opens. (Moments that are still to come are not
    counted as free here either: `free` is without them.)
    """
    model, rollout = job.model, job.rollout
    tensor, _ = engine_sizes(job.parallel, rollout)
    itemsize = 2 if model.bf16 else 8 if model.fp64 else 4
    block = 1 if model.full_attention else rollout.rollout_block_size or model.block_size
    longest = -(-(rollout.rollout_max_prompt_len + rollout.rollout_max_response_len) // block) * block
    page = min(rollout.kv_page_size, max(longest, LARGE_PAGE))
    heads = model.num_query_groups // tensor
    shape = CacheShape(model.num_layers, page, heads, model.kv_channels, _Bytes(itemsize))
    token = shape.page_bytes // page
    limit = rollout.kv_cache_gib * GIB if rollout.kv_cache_gib is not None else rollout.kv_cache_memory_fraction * free
    work = _pass_bytes(job, tensor, itemsize)
    try:
        pages = num_pages(shape, rollout.max_running_requests, longest, int(max(0, min(limit, free))))
    except ConfigError as error:
        return EngineBytes(token, 0, 0, work, str(error))
    one = -(-longest // page) + 1
    return EngineBytes(token, (pages + 1) * shape.page_bytes, pages // one, work)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Stands for an element type where only its size matters."""

    itemsize: int


def _pass_bytes(job: Job, tensor: int, itemsize: int) -> int:
    """Working memory of one pass, an estimate: hidden states and the widest products of a layer for all its tokens, and
    for the positions that are masked the logits of the policy, in fp32, twice.
    """
    model, rollout = job.model, job.rollout
    tokens = rollout.max_tokens_per_pass or TOKENS_PER_PASS
    wide = max(model.ffn_hidden_size, (model.moe_ffn_hidden_size or 0) * (model.moe_router_topk or 0))
    heads = model.num_attention_heads * model.kv_channels
    layer = tokens * itemsize * (4 * model.hidden_size + 3 * wide // tensor + 3 * heads // tensor)
    block = rollout.rollout_block_size or model.block_size or 1
    masked = min(tokens, rollout.max_running_requests * block)
    multiple = model.make_vocab_size_divisible_by
    padded = math.ceil(model.vocab_size / multiple) * multiple
    return layer + masked * padded // tensor * 4 * 2
