"""Plans alone, without processes: their copies are carried out on tensors whose elements are all different."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_dlm.rollout.reshard_plan import Copy, Plan, Shard, canonical, is_expert, plan_refit

LAYERS, EXPERTS, MIB = 4, 4, 2**20

# name of a layer's tensor -> (whole shape, dimension that is cut, blocks)
DENSE = {
    "self_attention.linear_qkv.weight": ((32, 6), 0, 1),
    "self_attention.linear_proj.weight": ((6, 16), 1, 1),
    "mlp.linear_fc1.weight": ((48, 6), 0, 2),
    "input_layernorm.weight": ((6,), None, 1),
}
ROUTED = {
    "linear_fc1.weight": ((16, 6), 0, 2),
    "linear_fc2.weight": ((6, 8), 1, 1),
}
ENDS = {
    "embedding.word_embeddings.weight": ((64, 6), 0, 1),
    "decoder.final_layernorm.weight": ((6,), None, 1),
    "output_layer.weight": ((64, 6), 0, 1),
}


def whole(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The whole tensor of this name: no number stands in it, or in another one, twice."""
    first = int.from_bytes(name.encode(), "big") % 2**40
    return first * 2**20 + torch.arange(math.prod(shape)).view(shape)


def cut(tensor: torch.Tensor, dim: int | None, stride: int, index: int, parts: int) -> torch.Tensor:
    """megatron-core's way: each block is split over the ranks, and a rank's pieces stand one after the other."""
    if dim is None:
        return tensor
    return torch.cat([block.chunk(parts, dim)[index] for block in tensor.chunk(stride, dim)], dim)


def model(world: int, tp: int = 1, pp: int = 1, chunks: int = 1, ep: int = 1, etp: int | None = None) -> list[dict]:
    """For each rank its tensors: name -> (Shard, tensor). Ranks count tensor first, then expert, data, pipeline."""
    etp = tp if etp is None else etp
    ranks = []
    for rank in range(world):
        inside, stage = rank % (world // pp), rank // (world // pp)
        per_chunk = LAYERS // (pp * chunks)
        layers = [(chunk * pp + stage) * per_chunk + number for chunk in range(chunks) for number in range(per_chunk)]
        tensors = []  # name, kind, which part of how many
        for layer in layers:
            tensors += [(f"decoder.layers.{layer}.{name}", kind, inside % tp, tp) for name, kind in DENSE.items()]
            first = inside // etp % ep * (EXPERTS // ep)
            tensors += [
                (f"decoder.layers.{layer}.mlp.experts.{number}.{name}", kind, inside % etp, etp)
                for number in range(first, first + EXPERTS // ep)
                for name, kind in ROUTED.items()
            ]
        for name, kind in ENDS.items():
            if stage == (0 if name.startswith("embedding") else pp - 1):
                tensors.append((name, kind, inside % tp, tp))
        found = {}
        for name, (shape, dim, stride), index, parts in tensors:
            part = cut(whole(name, shape), dim, stride, index, parts)
            found[name] = (Shard(name, tuple(part.shape), torch.int64, dim, stride, index, parts), part)
        ranks.append(found)
    return ranks


def shards(ranks: list[dict]) -> list[list[Shard]]:
    return [[shard for shard, _ in rank.values()] for rank in ranks]


def box(region) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in region)


def carry_out(plan: Plan, training: list[dict], rollout: list[dict]) -> list[dict[str, torch.Tensor]]:
    """What each rank has after the plan. A place that is written twice, or not at all, is seen."""
    have = [{name: torch.full_like(tensor, -1) for name, (_, tensor) in rank.items()} for rank in rollout]
    for rank, names in enumerate(plan.shared):
        for name in names:
            have[rank][name] = training[rank][name][1]
    for copy in itertools.chain(plan.local, *plan.batches):
        target = have[copy.target][copy.name][box(copy.target_region)]
        assert (target == -1).all()
        piece = training[copy.source][copy.name][1][box(copy.source_region)]
        assert piece.shape == target.shape and piece.nbytes == copy.nbytes
        target.copy_(piece)
    return have


LAYOUTS = [
    dict(),
    dict(tp=2),
    dict(tp=4),
    dict(pp=2),
    dict(pp=4),
    dict(tp=2, pp=2),
    dict(pp=2, chunks=2),
    dict(tp=2, pp=2, chunks=2),
    dict(ep=2),
    dict(ep=4),
    dict(tp=2, ep=2, etp=1),
    dict(tp=2, ep=2),
    dict(pp=2, ep=2),
]


@pytest.mark.parametrize("before", LAYOUTS, ids=str)
@pytest.mark.parametrize("after", [layout for layout in LAYOUTS if "pp" not in layout], ids=str)
@pytest.mark.parametrize("bucket", [100, 2000, MIB])
def test_every_rank_gets_what_it_needs(before: dict, after: dict, bucket: int) -> None:
    training, rollout = model(4, **before), model(4, **after)
    plan = plan_refit(shards(training), shards(rollout), bucket, ranks_per_host=2)
    for have, want in zip(carry_out(plan, training, rollout), rollout, strict=True):
        for name, (_, tensor) in want.items():
            assert torch.equal(have[name], tensor), name
    for batch in plan.batches:
        for rank in range(4):
            assert sum(copy.nbytes for copy in batch if rank in (copy.source, copy.target)) <= bucket
    for copy in itertools.chain(*plan.batches):
        assert copy.source != copy.target
        giver, taker = training[copy.source][copy.name][0], training[copy.target].get(copy.name)
        assert taker is None or taker[0].part != giver.part  # nothing is sent that its receiver has
        near = [rank for rank in range(4) if rank // 2 == copy.target // 2 and copy.name in training[rank]]
        if any(training[rank][copy.name][0].part == giver.part for rank in near):
            assert copy.source in near
    assert all(copy.source == copy.target for copy in plan.local)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "pp" not in layout], ids=str)
def test_the_same_layout_shares_everything(layout: dict) -> None:
    ranks = model(4, **layout)
    plan = plan_refit(shards(ranks), shards(ranks), MIB)
    assert plan == Plan(tuple(frozenset(rank) for rank in ranks), (), ())


def test_replicas_share_the_load() -> None:
    """Four of eight ranks have the first stage, four the second: each sends as much as the others."""
    plan = plan_refit(shards(model(8, pp=2)), shards(model(8)), MIB)
    sent = [0] * 8
    for copy in itertools.chain(*plan.batches):
        sent[copy.source] += copy.nbytes
    assert max(sent) < 1.2 * min(sent)


def test_a_replica_of_the_own_host_is_preferred() -> None:
    training, rollout = model(8, pp=2), model(8)
    everywhere = plan_refit(shards(training), shards(rollout), MIB)
    assert any(copy.source // 4 != copy.target // 4 for copy in itertools.chain(*everywhere.batches))
    # Hosts of stage pairs: rank r and r + 4 cannot share one, so ranks are renumbered 0 4 1 5 2 6 3 7.
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    mixed = [shards(training)[rank] for rank in order], [shards(rollout)[rank] for rank in order]
    near = plan_refit(*mixed, MIB, ranks_per_host=2)
    assert all(copy.source // 2 == copy.target // 2 for copy in itertools.chain(*near.batches))


def test_a_gated_layer_is_cut_gate_by_gate_and_up_by_up() -> None:
    def part(index: int, parts: int) -> Shard:
        return Shard("fc1", (8 // parts, 3), torch.float32, 0, 2, index, parts)

    plan = plan_refit([[part(0, 2)], [part(1, 2)]], [[part(0, 1)]] * 2, MIB)
    received = [copy for copy in itertools.chain(*plan.batches) if copy.target == 0]
    assert received == [
        Copy("fc1", 1, 0, ((0, 2), (0, 3)), ((2, 4), (0, 3)), 24),
        Copy("fc1", 1, 0, ((2, 4), (0, 3)), ((6, 8), (0, 3)), 24),
    ]


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        ("mlp.experts.local_experts.1.linear_fc1.weight", 4, "mlp.experts.5.linear_fc1.weight"),
        ("mlp.experts.linear_fc1.weight1", 4, "mlp.experts.5.linear_fc1.weight"),
        ("mlp.experts.linear_fc2.bias12", 0, "mlp.experts.12.linear_fc2.bias"),
        ("mlp.shared_experts.linear_fc1.weight", 4, "mlp.shared_experts.linear_fc1.weight"),
        ("mlp.router.expert_bias", 4, "mlp.router.expert_bias"),
        ("self_attention.linear_qkv.weight", 4, "self_attention.linear_qkv.weight"),
    ],
)
def test_experts_are_counted_over_the_whole_model(name: str, first: int, expected: str) -> None:
    layer = "decoder.layers.3."
    assert canonical(layer + name, first) == layer + expected
    assert is_expert(layer + expected) == (".experts." in name)


def test_experts_in_one_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match="experts.weight1 holds several"):
        canonical("decoder.layers.0.mlp.experts.weight1", 0)


def plain(name: str, *shape: int, dtype: torch.dtype = torch.float32, **how: int) -> Shard:
    return Shard(name, shape, dtype, **how)


@pytest.mark.parametrize(
    ("training", "rollout", "words"),
    [
        ([plain("a", 4)], [plain("a", 4), plain("b", 4)], ["only the rollout model has ['b']"]),
        ([plain("a", 4), plain("b", 4)], [plain("a", 4)], ["only the training model has ['b']"]),
        ([plain("a", 4, 2)], [plain("a", 4, 3)], ["a has shape (4, 3)", "(4, 2) in training"]),
        ([plain("a", 4)], [plain("a", 4, dtype=torch.bfloat16)], ["a is torch.bfloat16", "casts nothing"]),
        (
            [plain("output_layer.weight", 64, 2)],
            [plain("output_layer.weight", 72, 2)],
            ["output_layer.weight", "(72, 2)", "(64, 2)", "vocabulary must be padded alike"],
        ),
        ([plain("a", 4, dim=0, parts=2)], [plain("a", 8)], ["a", "2 parts", "no training rank"]),
        ([plain("a", 6, dim=0, stride=4)], [plain("a", 3, dim=0, stride=4, parts=2)], ["a", "3", "4 equal blocks"]),
        ([plain("a", 4, 4, dim=0)], [plain("a", 4, 2, dim=1, parts=2)], ["a is cut differently"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(training, rollout, words) -> None:
    with pytest.raises(ValueError) as error:
        plan_refit([training], [rollout], MIB)
    assert all(word in str(error.value) for word in words), error.value


def test_training_ranks_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="training ranks disagree about a"):
        plan_refit([[plain("a", 4)], [plain("a", 5)]], [[plain("a", 4)]] * 2, MIB)


def test_an_element_is_the_smallest_piece() -> None:
    plan = plan_refit([[plain("a", 3, 2)], []], [[], [plain("a", 3, 2)]], 1)
    assert [[copy.nbytes for copy in batch] for batch in plan.batches] == [[4]] * 6
    assert {copy.source_region for (copy,) in plan.batches} == {
        ((row, row + 1), (column, column + 1)) for row in range(3) for column in range(2)
    }
