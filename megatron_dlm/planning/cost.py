"""What a step costs: seconds, FLOPs and bytes per phase, from a model's shape, a layout, a workload and hardware.

    cost = step_cost(model, Layout(world=64, tp=4, pp=2), Workload(), hardware_named("h100"))
    cost.seconds, cost.phases["train"].bound

Pure arithmetic: nothing is built, nothing is measured. Phases follow each other, as in rl/trainer.py; rewards are left
out. Within a phase, what our code does not overlap is added up: matrix products, attention, passes over memory,
collectives. Not modelled: compilation, kernels' starts in training, the host's work (packing, queues, rewards),
uneven routing to experts, checkpoints, stragglers.

Invariants (tests/planning/test_cost.py): FLOPs are those that torch counts, bytes those of collectives that really run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.context import shared_length
from megatron_dlm.planning.decode import rollout_cost
from megatron_dlm.planning.hardware import Hardware
from megatron_dlm.planning.layout import Layout, Workload, lengths, supervised
from megatron_dlm.planning.phase import Phase, Tally
from megatron_dlm.planning.work import (
    ATTENTION_BACKWARD,
    BACKWARD,
    LOGIT_BYTES,
    QUANTISED_BYTES,
    TRITON_LOGIT_BYTES,
    Rows,
    attention_flops,
    body_flops,
    check_blocks,
    head_flops,
    layer_traffic,
    padded_vocabulary,
    quantised_numbers,
    rows_of_update,
    sizes_of,
)

__all__ = ["Layout", "Phase", "StepCost", "Workload", "lengths", "step_cost", "supervised"]

PHASES = ("rollout", "old_logprobs", "reference", "values", "train", "train_value", "refit")


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step takes.

    Attributes:
        phases: by name (`PHASES`); those that do not happen are not there.
        tokens: response tokens of the step.
    """

    phases: Mapping[str, Phase]
    tokens: float

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def flops(self) -> float:
        """Of a rank, on average."""
        return sum(phase.flops for phase in self.phases.values())

    @property
    def bound(self) -> tuple[str, str]:
        """The longest phase, and what most of its time goes to."""
        name = max(self.phases, key=lambda name: self.phases[name].seconds)
        return name, self.phases[name].bound


def step_cost(
    model: ModelConfig,
    layout: Layout,
    workload: Workload,
    hardware: Hardware,
    kv_bytes: float | None = None,
) -> StepCost:
    """Args:
        model: resolved (model/shape.py).
        kv_bytes: memory of a rank's KV cache; None is as much as `max_running` responses want.

    Raises:
        ConfigError: a layout that the world or the model does not divide into, rows that do not hold a response, or a
            model of full attention.
    """
    phases = dict(training_phases(model, layout, workload, hardware))
    if workload.rollout:
        phases["rollout"] = rollout_cost(model, layout, workload, hardware, kv_bytes)
        phases["refit"] = refit_cost(model, layout, workload, hardware)
    return StepCost({name: phases[name] for name in PHASES if name in phases}, workload.tokens_generated)


def training_phases(model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware) -> Mapping[str, Phase]:
    """All phases in which rows are passed. Raises: as `step_cost`."""
    layout.check(model)
    check_blocks(model)
    rows = rows_of(layout, workload)
    one = lambda backward, policy=True: _pass(model, layout, workload, hardware, rows, backward, policy)
    update = lambda policy=True: one(True, policy).plus(_update(model, layout, workload, hardware, rows, policy))
    facts = dict(
        rows=rows.rows,
        row_tokens=rows.tokens,
        filled=rows.mean_filled / rows.tokens,  # of all ranks' rows; the rest is padding
        targets=rows.targets,
        area=rows.area,
    )
    phases: dict[str, Phase] = {}
    if workload.rollout:
        again = workload.updates - 1 if workload.old_logprobs == "recomputed" else 0
        if again:
            phases["old_logprobs"] = one(False).times(again).phase()
        if workload.reference:
            phases["reference"] = one(False).times(workload.updates).phase()
        if workload.value_model:
            phases["values"] = one(False, False).times(workload.updates).phase()
            phases["train_value"] = update(False).times(workload.updates).phase(**facts)
    phases["train"] = update().times(workload.updates).phase(**facts)
    return phases


def rows_of(layout: Layout, workload: Workload) -> Rows:
    """The rows of an update, as the layout wants them."""
    multiple = layout.row_multiple(workload.attention)
    return rows_of_update(workload, layout.data, multiple, layout.pp if layout.vpp > 1 else 1)


def _pass(
    model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware, rows: Rows, backward: bool, policy: bool
) -> Tally:
    """One pass over the rows of an update, on the last pipeline stage, which also has the head: where stages have
    different work, all wait for it.

    With m rows, p stages and v virtual ones, a 1F1B pipeline takes m + (p - 1) / v times what a row takes on a stage
    (Narayanan et al., arXiv 2104.04473, section 2.2).
    """
    row = _row(model, layout, workload, hardware, rows, backward, policy)
    tally = row.times(rows.rows)
    if layout.pp > 1:
        tally.add("bubble", row.seconds * (layout.pp - 1) / layout.vpp)
        # Between stages: the hidden states of a row, and their gradient back, at every boundary of virtual stages.
        held = _held(layout, workload, rows) / (layout.tp if layout.sequence_parallel else 1)
        boundaries = (layout.pp * layout.vpp - 1) / layout.pp  # for each rank, on average
        messages = (2 if backward else 1) * boundaries * rows.rows
        link = hardware.link(2, layout.world // layout.pp)
        tally.send("pipeline", link, messages * held * model.hidden_size * workload.itemsize, messages)
    return tally


def _row(
    model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware, rows: Rows, backward: bool, policy: bool
) -> Tally:
    """One row on the last stage.

    FLOPs in the tally are the mean over ranks; seconds are those of the last stage. Forward passes count once, or
    twice where the backward pass computes them again (recompute: the layers; selective: attention).
    """
    shared, stages = layout.tp * layout.cp, layout.pp
    held = _held(layout, workload, rows)
    forward = 2 if backward and layout.recompute == "full" else 1
    scores = 2 if backward and layout.recompute != "none" else 1
    body = body_flops(model, held * layout.cp) * (forward + BACKWARD * backward)
    attention = (scores + ATTENTION_BACKWARD * backward) * attention_flops(model, 1)
    head = head_flops(model, rows.targets) * (1 + BACKWARD * backward) if policy else 0.0
    tally = Tally()
    tally.flops = (body + attention * rows.mean_area + head) / (shared * stages)
    peak, fp8 = hardware.bf16_flops, _share_in_fp8(model, layout)
    tally.add("products", (body * (1 - fp8) / stages + head) / shared / (peak * hardware.matmul_fraction))
    if fp8:
        tally.add("products", body * fp8 / stages / shared / hardware.fp8_rate())
    tally.add("attention", attention * rows.area / stages / shared / (peak * hardware.attention_fraction))

    moved = held * model.num_layers / stages * _moved_by_token(model, layout, workload, fp8, forward, backward)
    if policy:
        logit = TRITON_LOGIT_BYTES if workload.triton_head else LOGIT_BYTES
        moved += rows.targets / shared * padded_vocabulary(model) * logit * (2 if backward else 1)
    if backward:  # each row's gradient of each parameter is written, read, and added to an fp32 sum
        moved += parameters_of_a_rank(model, layout, policy)[2] * (2 * workload.itemsize + 8)
    tally.add("memory", moved / (hardware.memory_bandwidth * hardware.bandwidth_fraction))
    _layer_collectives(tally, model, layout, workload, hardware, rows, forward, backward, policy)
    return tally


def _share_in_fp8(model: ModelConfig, layout: Layout) -> float:
    """Of the layers of the last pipeline stage, for which all others wait: it has the head, and the last layers."""
    each = model.num_layers // layout.pp
    precision = layout.precision
    return sum(precision.in_fp8(model.num_layers - 1 - n, model.num_layers) for n in range(each)) / each


def _moved_by_token(
    model: ModelConfig, layout: Layout, workload: Workload, fp8: float, forward: int, backward: bool
) -> float:
    """Bytes that a token moves through a rank's memory in a layer, beside products and attention."""
    each = lambda wide, rest: wide / (layout.tp if layout.sequence_parallel else 1) + rest / layout.tp
    moved = each(*layer_traffic(model, workload.itemsize, layout.precision.fused)) * (forward + 2 * backward)
    if fp8:
        read, made = quantised_numbers(model)
        rounded = each(*read) * forward + each(*made) * backward
        moved += fp8 * QUANTISED_BYTES[layout.precision.recipe] * rounded
    return moved


def _held(layout: Layout, workload: Workload, rows: Rows) -> int:
    """Tokens of a row that a rank holds: with context parallelism its share, with room for units that do not come out
    even.
    """
    if layout.cp == 1:
        return rows.tokens
    return shared_length(rows.tokens, layout.cp, workload.block_size, layout.row_multiple(workload.attention))


def _layer_collectives(
    tally: Tally,
    model: ModelConfig,
    layout: Layout,
    workload: Workload,
    hardware: Hardware,
    rows: Rows,
    forward: int,
    backward: bool,
    policy: bool,
) -> None:
    """What the layers of a stage exchange for a row. A ring moves (n - 1) / n of a message per rank in an all-gather or
    a reduce-scatter, twice that in an all-reduce.

    - Tensor: attention and the dense feed-forward layer each all-gather their input and reduce-scatter their output
      (with sequence parallelism), or all-reduce the output. Backward: the output's gradient is gathered, the input
      gathered again for the weights' gradient, the input's gradient scattered: three against two; or one all-reduce.
      (Korthikanti et al., arXiv 2205.05198, section 4.)
    - Experts: tokens go to `moe_router_topk` experts, of which (n - 1) / n are elsewhere, and back; backward the same.
    - Context: the keys and values of clean tokens are gathered, and their gradients scattered back.
    """
    tp, ep, cp, etp = layout.tp, layout.ep, layout.cp, layout.expert_tp
    layers, item = model.num_layers / layout.pp, workload.itemsize
    expert_layers = sizes_of(model).expert_layers / layout.pp
    held = _held(layout, workload, rows)
    message = held * model.hidden_size * item
    if tp > 1:
        pairs = layers + (layers - expert_layers)  # of a column- and a row-parallel product
        split = layout.sequence_parallel
        each = 2 * forward + ((3 if split else 2) if backward else 0)
        sent = pairs * each * message * (tp - 1) / tp
        count = pairs * (each if split else each / 2)
        # The head gathers all hidden states, once; the embedding scatters them (or sums them), and gathers gradients.
        ends = 1 + (1 + backward if layout.pp == 1 else 0) if split else (2 if layout.pp == 1 else 0)
        sent, count = sent + ends * message * (tp - 1) / tp, count + ends
        if backward and policy:  # gradients of the hidden states at the targets, from all shards of the vocabulary
            sent += 2 * rows.targets / cp * model.hidden_size * item * (tp - 1) / tp
        tally.send("tensor", hardware.link(tp), sent, count)
    if expert_layers:
        tokens = held / (tp if layout.sequence_parallel else 1)
        dispatched = tokens * model.moe_router_topk * model.hidden_size * item
        times = 2 * (forward + backward)
        if ep > 1:
            link = hardware.link(ep, etp)
            tally.send("experts", link, expert_layers * times * dispatched * (ep - 1) / ep, expert_layers * times)
        if etp > 1:  # what an expert gets is gathered from the ranks that share it, and scattered back
            sent = expert_layers * times * dispatched * (etp - 1)
            tally.send("experts", hardware.link(etp), sent, expert_layers * times)
    if cp > 1:
        keys = rows.clean * 2 * model.num_query_groups / tp * model.kv_channels * item
        times = forward + backward
        tally.send("context", hardware.link(cp, tp), layers * times * keys * (cp - 1) / cp, layers * times)


def parameters_of_a_rank(model: ModelConfig, layout: Layout, policy: bool = True) -> tuple[float, float, float]:
    """Parameters of a rank of the stage that has most: without experts, of experts, both. The first stage has the
    embedding, the last one the head (a tied head is stored on both). A value model's head is one line.
    """
    sizes = sizes_of(model)
    dense = sizes.dense / layout.pp / layout.tp + _tables(model, layout, policy)
    experts = sizes.experts / (layout.pp * layout.ep * layout.expert_tp)
    return dense, experts, dense + experts


def _tables(model: ModelConfig, layout: Layout, policy: bool) -> float:
    """Parameters of embedding and head on a rank of the stage that has most."""
    sizes = sizes_of(model)
    head = (sizes.head or (sizes.embedding if layout.pp > 1 else 0)) if policy else 0
    return (sizes.embedding + head if layout.pp == 1 else max(sizes.embedding, head)) / layout.tp


def _update(
    model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware, rows: Rows, policy: bool
) -> Tally:
    """The end of an update: gradients over data-parallel ranks, the optimizer, parameters back.

    Gradients are summed in fp32. With the distributed optimizer they are reduce-scattered and parameters gathered;
    without, all-reduced. Overlapped, a reduction hides behind the last row's backward pass and a gather behind the
    first row's forward pass, but for one bucket (megatron-core: 40 million parameters, or 1 million per rank if that is
    more). Adam reads gradient, fp32 weight and two moments, writes the last three and the parameter; the sums of
    gradients are read for the norm and zeroed. Weights of layers in FP8 are rounded once; with --fp8-param-gather they
    are gathered as bytes.
    """
    dense, experts, all_of = parameters_of_a_rank(model, layout, policy)
    item, tally = workload.itemsize, Tally()
    fp8 = layout.precision.share(model.num_layers) * (1 - _tables(model, layout, policy) / all_of)
    gathered = item * (1 - fp8) + fp8 if layout.precision.gather else item  # bytes a parameter
    groups = (
        (dense, layout.replicas, layout.tp),
        (experts, layout.expert_replicas, layout.expert_tp * layout.ep),
    )
    shard = 0.0
    behind = _row(model, layout, workload, hardware, rows, True, policy).seconds
    hidden_gather, hidden_reduce = behind / 3, behind * 2 / 3
    for count, ranks, stride in groups:
        shard += count / (ranks if layout.distributed_optimizer else 1)
        if ranks == 1 or not count:
            continue
        link, part = hardware.link(ranks, stride), (ranks - 1) / ranks
        bucket = min(1.0, max(40e6, 1e6 * ranks) / count)
        halves = [(4, hidden_reduce), (gathered if layout.distributed_optimizer else 4, hidden_gather)]
        for size, window in halves:
            sent = part * count * size
            messages = max(1.0, 1 / bucket)
            whole = link.seconds(sent, messages)
            hides = layout.overlap and (size == 4 or layout.distributed_optimizer)
            exposed = max(whole - window, whole * bucket) if hides else whole
            tally.send("data", link, sent, messages, exposed)
    moved = shard * (4 * 7 + item) + all_of * (8 + fp8 * (2 if layout.precision.gather else item + 2))
    tally.add("optimizer", moved / (hardware.memory_bandwidth * hardware.bandwidth_fraction))
    return tally


def refit_cost(model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware) -> Phase:
    """Weights to the engine: what a rank needs there and does not hold as it trains.

    An engine's rank has 1 / engine_tp of everything, all layers, all experts. As it trains, it holds one stage's
    tensor shard of that and some experts. Layers of other stages come from other nodes, because stages stand far apart;
    the rest comes from tensor- and expert-parallel neighbours. What it sends is on average what it gets. Where all is
    there already, nothing moves (rollout/refit.py); weights in FP8 are rounded, then, too, into storage of their own.
    """
    sizes, tp = sizes_of(model), layout.engine_tp
    tables = sizes.embedding + sizes.head
    tally = Tally()
    rest = (sizes.dense + tables) / tp
    own = min(1.0, tp / layout.tp)  # of a stage's shard of it
    far, near = rest * (1 - 1 / layout.pp), rest / layout.pp * (1 - own)
    experts = sizes.experts / tp
    own = min(1.0, tp / layout.expert_tp) / layout.ep
    far, near = far + experts * (1 - 1 / layout.pp), near + experts / layout.pp * (1 - own)
    item = workload.itemsize
    if far:
        tally.send("refit", hardware.link(2, layout.world // layout.pp), far * item, model.num_layers)
    if near:
        near_group = max(layout.tp, layout.ep * layout.expert_tp, 2)
        tally.send("refit", hardware.link(near_group), near * item, model.num_layers)
    if layout.rollout_fp8:
        rounded = (sizes.dense + sizes.experts) / tp * (item + 1)
        tally.add("refit", rounded / (hardware.memory_bandwidth * hardware.bandwidth_fraction))
    return tally.phase(shared=float(not tally.parts))
