"""Whether a layout fits a device's memory, by a formula: quick enough to look at thousands of layouts.

`python -m megatron_dlm plan` measures instead, rank by rank; take its word before paying for devices.
"""

from __future__ import annotations

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.planning.cost import parameters_of_a_rank, rows_of
from megatron_dlm.planning.decode import cache_bytes
from megatron_dlm.planning.hardware import Hardware
from megatron_dlm.planning.layout import Layout, Workload
from megatron_dlm.planning.work import padded_vocabulary, sizes_of

USABLE = 0.92  # of a device's memory; the rest is for its driver, communication and gaps. Assumption.
CACHE = 0.8  # of what is free in the rollout, for keys and values; the rest is for the engine's activations
LOSS_CHUNK = 1024  # targets whose logits are there at a time (--loss-chunk-size)


def static_bytes(model: ModelConfig, layout: Layout, workload: Workload) -> float:
    """Weights, fp32 gradients, and Adam's state (fp32 weights where the model's are of 2 bytes, two moments), of the
    stage that has most; of the value model too, if there is one; a reference's weights. Copies of weights in FP8.
    """
    found = 0.0
    for policy in (True, False) if workload.value_model else (True,):
        dense, experts, both = parameters_of_a_rank(model, layout, policy)
        ranks = (layout.replicas, layout.expert_replicas) if layout.distributed_optimizer else (1, 1)
        adam = 12 if workload.itemsize == 2 else 8
        found += both * (workload.itemsize + 4) + adam * (dense / ranks[0] + experts / ranks[1])
        found += copies_in_fp8(model, layout)
    if workload.reference:
        found += parameters_of_a_rank(model, layout)[2] * workload.itemsize
    return found


def copies_in_fp8(model: ModelConfig, layout: Layout) -> float:
    """Of a model that learns, beside its weights; scales left out. (--fp8-param-gather has them in their place: two
    bytes a number, too.)
    """
    precision, sizes = layout.precision, sizes_of(model)
    if precision.recipe is None or precision.gather:
        return 0.0
    layers = sizes.dense / (layout.pp * layout.tp) + sizes.experts / (layout.pp * layout.ep * layout.expert_tp)
    return precision.share(model.num_layers) * layers * precision.weight_bytes(128, 128) / 128**2


def engine_bytes(model: ModelConfig, layout: Layout, workload: Workload) -> float:
    """Weights of an engine that cannot read those of training in their place."""
    if layout.pp == 1 and layout.engine_tp == layout.tp and layout.ep == 1 and layout.expert_tp == layout.tp:
        return 0.0
    return sizes_of(model).total * workload.itemsize / layout.engine_tp


def activation_bytes(model: ModelConfig, layout: Layout, workload: Workload, tokens: int, rows: int) -> float:
    """What rows in flight keep for their backward pass, on the first stage, and one chunk of logits.

    A layer keeps the inputs of its two norms and of the products behind them, queries, keys and values before and after
    norms and rotation, attention's output, and three times the width of the gated unit (its two halves and their
    product) besides what silu keeps; an attention that keeps no scores is taken for granted. Fused layers keep the
    unit's two halves and their product, and layers in FP8 a byte of what products read. Full recomputation keeps a
    layer's input, and one layer as a whole. A 1F1B pipeline has as many rows in flight as stages, an interleaved one
    pp (1 + (pp - 1) / (pp vpp)) stages' worth (arXiv 2104.04473, section 2.2).
    """
    item, held = workload.itemsize, tokens / layout.cp
    split = layout.tp if layout.sequence_parallel else 1
    read = 1 - layout.precision.share(model.num_layers) / 2
    wide = model.hidden_size * (2 + 2 * read) / split
    keys, queries = model.num_query_groups * model.kv_channels, model.num_attention_heads * model.kv_channels
    ffn = model.moe_router_topk * model.moe_ffn_hidden_size if model.num_experts else model.ffn_hidden_size
    rest = (4 * queries + 4 * keys + (2 + read if layout.precision.fused else 4) * ffn) / layout.tp
    if model.num_experts:
        rest += 2 * model.moe_router_topk * model.hidden_size / layout.tp
    layer = held * item * (wide + rest)
    layers = model.num_layers / layout.pp
    flying = min(layout.pp, rows) * (1 + (layout.pp - 1) / (layout.pp * layout.vpp) if layout.vpp > 1 else 1)
    kept = held * item * model.hidden_size / split * layers * flying + layer
    if layout.recompute != "full":
        kept = layer * layers * flying
    logits = LOSS_CHUNK * padded_vocabulary(model) / layout.tp * 16
    return kept + logits


def cache_room(model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware) -> float | None:
    """Bytes for keys and values on each device while responses are generated; None where the layout does not fit.

    The cache is taken to be free while models are trained (--offload-rollout); the optimizer stays.

    Raises:
        ConfigError: rows that do not hold a response.
    """
    usable = hardware.memory_bytes * USABLE
    static = static_bytes(model, layout, workload) + engine_bytes(model, layout, workload) * workload.rollout
    rows = rows_of(layout, workload)
    if static + activation_bytes(model, layout, workload, rows.tokens, rows.rows) > usable:
        return None
    free = (usable - static) * CACHE
    one = cache_bytes(model, workload.itemsize) * (workload.prompt_length + max(workload.responses)) / layout.engine_tp
    return free if free >= one or not workload.rollout else None


def fits(model: ModelConfig, layout: Layout, workload: Workload, hardware: Hardware) -> bool:
    """Whether a legal layout fits."""
    try:
        layout.check(model)
        return cache_room(model, layout, workload, hardware) is not None
    except ConfigError:
        return False
