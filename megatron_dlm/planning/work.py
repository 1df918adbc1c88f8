"""What the rows of an update hold, and how many FLOPs a model spends on them.

The rows are those of our own layout (docs/architecture.md, 2): the clean text once, one noisy copy of a block per
denoising step that it really took, the prompt's full blocks once per group and row, the head on targets only. Which
responses share a row is decided by the planner itself (diffusion/planner.py) over lengths that are drawn.

Invariants (tests/planning/test_work.py): tokens, targets and areas are those of rows that are really built; FLOPs are
those that torch counts in a model that really runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.planner import ROW_MULTIPLE, Load, pack_parts
from megatron_dlm.model.size import model_size
from megatron_dlm.planning.layout import Workload

_RANKS = 128  # a job of more data-parallel ranks is planned as one of so many, with as many responses for each


@dataclass(frozen=True, slots=True)
class Part:
    """A response, or a part of one that does not fit a row: its noisy copies and the clean text that they read.

    Attributes:
        shared, own: tokens of the prompt's full blocks, and of the rest. clean: clean ones of the latter.
        targets: tokens that pass the head.
        shared_area, own_area: pairs of a query and a key that see each other.
    """

    shared: int
    own: int
    clean: int
    targets: float
    shared_area: float
    own_area: float


def parts_of(prompt: int, response: int, workload: Workload) -> list[Part]:
    """The parts of one response.

    With P the prompt and B the block, the prompt's full blocks are shared, and n = ceil((P mod B + R) / B) blocks hold
    a response token. All of them but the last are stored clean (nothing reads the last), each is copied s times. A
    token of block j, clean or not, sees the shared prompt, j clean blocks of the response and its own block, so that
    the first m clean blocks make m B shared + B^2 m (m + 1) / 2 pairs, and so does one copy of each.

    Raises:
        ConfigError: the text alone does not fit a row.
    """
    block, copies, budget = workload.block_size, workload.steps_per_block, workload.row_budget
    shared = prompt - prompt % block
    blocks = math.ceil((prompt % block + response) / block)
    pairs = lambda m: block * (m * shared + block * m * (m + 1) / 2)
    shared_area = block * block * (shared // block) * (shared // block + 1) / 2
    found, done = [], 0
    while done < blocks:
        # The most blocks whose copies fit beside the clean text before the last of them.
        room = (budget - shared + block + copies * block * done) / (block * (1 + copies))
        end = min(blocks, math.floor(room + 1e-9))
        if shared + (end - 1) * block + math.ceil(copies * block * (end - done)) > budget:
            end -= 1  # a fraction of a copy was rounded up
        if end <= done:
            least = shared + (blocks - 1) * block + math.ceil(copies) * block
            raise ConfigError(
                f"rows of {budget} tokens do not hold a response of {response} tokens behind a prompt of {prompt}. "
                f"Use a row budget of more than {least}."
            )
        clean = (end - 1) * block
        own = clean + math.ceil(copies * block * (end - done))
        area = pairs(end - 1) + copies * (pairs(end) - pairs(done))
        found.append(Part(shared, own, clean, response * (end - done) / blocks, shared_area, area))
        done = end
    return found


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an update as the slowest data-parallel rank has them; means over its rows, which are all of one
    length.

    Attributes:
        rows: of a rank. tokens: T of each. filled: those that are not padding. clean, targets, area: of a row.
        mean_area, mean_filled: the same over all ranks' rows.
    """

    rows: int
    tokens: int
    filled: float
    clean: float
    targets: float
    area: float
    mean_area: float
    mean_filled: float


@lru_cache(maxsize=4096)
def rows_of_update(workload: Workload, ranks: int, multiple: int = ROW_MULTIPLE, rows_multiple: int = 1) -> Rows:
    """Plan one update as the trainer would.

    Args:
        ranks: that get rows of their own.
        multiple: T is a multiple of this. rows_multiple: and the number of a rank's rows of that.
    """
    planned = min(ranks, _RANKS)
    responses = max(1, round(workload.responses_per_update * planned / ranks))
    learned = max(responses, round(workload.responses_learned * planned / ranks))
    rng = np.random.default_rng(workload.seed)
    every = np.tile(np.array(workload.responses), math.ceil(responses / len(workload.responses)))
    drawn = rng.permutation(every)[:responses]
    # Responses of a step are shuffled and dealt to updates; so an update has some of each group.
    group = rng.permutation(np.arange(learned) // workload.samples)[:responses]
    items = [parts_of(workload.prompt_length, int(length), workload) for length in drawn]
    loads = [
        [Load(str(g), part.shared, part.own, round(part.shared_area), round(part.own_area)) for part in parts]
        for g, parts in zip(group, items)
    ]
    plan = pack_parts(loads, workload.row_budget, planned, multiple, workload.together, rows_multiple)
    sums = []  # of each rank: filled, clean, targets, area
    for members, numbers in zip(plan.ranks, plan.parts):
        held = [
            _row([(int(group[i]), items[i][p]) for i, p in zip(row, which)], workload.attention)
            for row, which in zip(members, numbers)
        ]
        sums.append(np.sum(held, axis=0))
    slowest = max(sums, key=lambda total: total[3])
    mean = np.mean(sums, axis=0)
    count = len(plan.ranks[0])
    return Rows(count, plan.length, *(slowest / count).tolist(), float(mean[3]) / count, float(mean[0]) / count)


def _row(parts: list[tuple[int, Part]], attention: str) -> tuple[float, float, float, float]:
    """filled, clean, targets, area of one row."""
    groups: dict[int, list[Part]] = defaultdict(list)
    for group, part in parts:
        groups[group].append(part)
    filled = clean = targets = area = 0.0
    for members in groups.values():
        tokens = members[0].shared + sum(part.own for part in members)
        filled += tokens
        clean += members[0].shared + sum(part.clean for part in members)
        targets += sum(part.targets for part in members)
        pairs = members[0].shared_area + sum(part.own_area for part in members)
        area += tokens**2 if attention == "dense" else pairs
    return filled, clean, targets, area


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of a model by how they are spread and used.

    Attributes:
        dense: of the layers, without experts. experts: of all experts. active: of the layers, for one token.
        embedding, head: tables. one_expert: parameters of an expert. expert_layers: layers that have experts.
    """

    dense: int
    experts: int
    active: int
    embedding: int
    head: int
    one_expert: int
    expert_layers: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.embedding + self.head


def check_blocks(model: ModelConfig) -> None:
    """Refuse what the seconds of a step are not modelled for.

    Raises:
        ConfigError: a model of full attention, whose passes are of another kind.
    """
    if model.full_attention:
        raise ConfigError("the cost of a step is modelled for attention in blocks only, not for full attention.")


def sizes_of(model: ModelConfig) -> Sizes:
    """Sizes of a resolved configuration (model/size.py), with experts apart."""
    key = tuple(getattr(model, name) for name in _SHAPE)
    if key not in _known:
        _known[key] = _sizes_of(model)
    return _known[key]


_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_SHAPE += ("qk_layernorm", "add_qkv_bias", "untie_embeddings_and_output_weights", "vocab_size")
_SHAPE += ("make_vocab_size_divisible_by", "num_experts", "moe_router_topk", "moe_ffn_hidden_size")
_SHAPE += ("moe_first_k_dense", "moe_shared_expert_intermediate_size")
_known: dict[tuple, Sizes] = {}


def _sizes_of(model: ModelConfig) -> Sizes:
    size = model_size(model)
    one = layers = 0
    if model.num_experts is not None:
        layers = model.num_layers - model.moe_first_k_dense
        one = 3 * model.hidden_size * model.moe_ffn_hidden_size
    experts = layers * one * (model.num_experts or 0)
    return Sizes(size.body - experts, experts, size.body - size.idle, size.embedding, size.head, one, layers)


def padded_vocabulary(model: ModelConfig) -> int:
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def body_flops(model: ModelConfig, tokens: float) -> float:
    """Forward FLOPs of the layers' matrix products: 2 per parameter that a token passes. (Norms and biases are counted
    in, a thousandth of them.)
    """
    return 2.0 * sizes_of(model).active * tokens


def attention_flops(model: ModelConfig, area: float) -> float:
    """Forward FLOPs of attention over so many pairs: scores and the weighted sum of values, 2 x width each, in every
    head of every layer.
    """
    return 4.0 * model.num_layers * model.num_attention_heads * model.kv_channels * area


def head_flops(model: ModelConfig, targets: float) -> float:
    """Forward FLOPs of the vocabulary's table at the targets."""
    return 2.0 * padded_vocabulary(model) * model.hidden_size * targets


BACKWARD = 2.0
"""A matrix product's backward over its forward: gradients of its input and of its weights."""
ATTENTION_BACKWARD = 2.5
"""The same of attention that keeps no scores: five products (scores again, and the gradients of values, probabilities,
queries and keys) instead of two. Source: FlashAttention, arXiv 2205.14135, algorithm 4."""


def layer_traffic(model: ModelConfig, itemsize: int, fused: bool = False) -> tuple[float, float]:
    """Bytes that one token moves through memory in the forward pass of a layer, outside its matrix products and
    attention: of what is as wide as the hidden state, and of the rest, which tensor-parallel ranks always share.

    Counted over the operations as they are written (model/norm.py and megatron-core's unfused layers), each reading and
    writing whole tensors. Two norms (in bfloat16: a copy in fp32, its norm, the product, a cast, the weight: 28 bytes
    an element; in fp32 five passes), two residual sums (3 passes); norms of queries and keys, and their rotation (10
    passes); the gated unit (5 passes over its width); experts' tokens are permuted there and back (4 passes).

    Layers of Transformer Engine (`fused`) have kernels that read and write once: norms and rotations 2 passes, the
    gated unit 3.
    """
    norm = 2 * itemsize if fused else 28 if itemsize == 2 else 5 * itemsize
    wide = model.hidden_size * (2 * norm + 2 * 3 * itemsize)
    heads = (model.num_attention_heads + model.num_query_groups) * model.kv_channels
    rest = heads * ((2 if fused else 10) * itemsize + (norm if model.qk_layernorm else 0))
    experts = model.num_experts is not None
    ffn = model.moe_router_topk * model.moe_ffn_hidden_size if experts else model.ffn_hidden_size
    rest += (3 if fused else 5) * itemsize * ffn
    if experts:
        rest += 4 * itemsize * model.moe_router_topk * model.hidden_size
    return float(wide), float(rest)


def quantised_numbers(model: ModelConfig) -> tuple[tuple[float, float], tuple[float, float]]:
    """Numbers of a token that a layer in FP8 rounds: those that its products read, and the gradients of those that they
    make; of each what is as wide as the hidden state, and the rest, as in `layer_traffic`.
    """
    queries = model.num_attention_heads * model.kv_channels
    keys = 2 * model.num_query_groups * model.kv_channels
    ffn = model.ffn_hidden_size
    if model.num_experts is None:
        return (2.0 * model.hidden_size, queries + ffn), (2.0 * model.hidden_size, queries + keys + 2 * ffn)
    chosen = model.moe_router_topk  # copies of a token go to the experts, in the parts that tensor-parallel ranks have
    routed, made = chosen * model.moe_ffn_hidden_size, chosen * model.hidden_size
    return (
        (1.0 * model.hidden_size, queries + routed + made),
        (1.0 * model.hidden_size, queries + keys + 2 * routed + made),
    )


QUANTISED_BYTES = {"tensorwise": 6.0, "delayed": 4.0, "blockwise": 4.0, "mxfp8": 4.0}
"""Bytes that a number moves through memory to be rounded: read, written by rows and by columns; `tensorwise` reads it
once more, for the largest. (What a kernel makes as it writes its result is counted as if it stood alone.)"""


LOGIT_BYTES = 40.0
"""Bytes that a logit moves through memory in a forward pass: made, cast to fp32, tempered, and the passes of a
log-softmax."""
TRITON_LOGIT_BYTES = 6.0
"""The same of a loss head in Triton: written by the product, and read once more; its backward pass writes, too."""
