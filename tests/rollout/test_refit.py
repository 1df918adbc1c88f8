"""Weights carried between layouts: what the rollout model then computes, against the training model's own passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.harness import pool
from tests.small_model import LENGTH, Setup, forward_step, gpt, make, rows, share, transformer_config

BUCKET = 10_000  # a bucket far smaller than the model


def rollout_model(setup: Setup, groups, meta: bool = True) -> torch.nn.Module:
    """A model of the layout of `groups`, its weights other than those of any training model."""
    alone = replace(setup, tp=groups.tp_size, ep=groups.ep_size, pp=1, virtual=None, sequence_parallel=False)
    model = gpt(alone, transformer_config(alone), groups).requires_grad_(False).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    return model.to("meta") if meta else model


def train_model(setup: Setup):
    """A TrainState whose buffers differ from layer to layer, and expert to expert."""
    from megatron.core import parallel_state

    from megatron_dlm.training.state import global_names

    state = make(setup)
    if setup.virtual is not None:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(setup.virtual)
    for chunk in state.unwrapped_chunks():
        rename = global_names(chunk)
        for name, buffer in chunk.named_buffers():
            layer = int(rename(name).split(".")[2])
            buffer.copy_(0.3 * torch.cos(torch.arange(buffer.numel()) + layer))
    return state


def mask():
    return torch.ones(LENGTH, LENGTH).tril().logical_not()[None, None]


def gathered(logits: torch.Tensor, group) -> torch.Tensor:
    """[1, LENGTH, V / TP] -> [1, LENGTH, V]."""
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1)


def trained_logits(state) -> torch.Tensor:
    from megatron_dlm.training.step import forward_only

    def step(row, model):
        return model(row, torch.arange(LENGTH)[None], mask()), lambda logits: gathered(logits, state.groups.tp).cpu()

    count = state.groups.pp_size if len(state.chunks) > 1 else 1  # interleaving wants as many rows as stages
    return forward_only(state, rows(1, seed=3) * count, step, LENGTH, collect="all")[0]


def rollout_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return gathered(model(rows(1, seed=3)[0], torch.arange(LENGTH)[None], mask()), model.pg_collection.tp)


def carried(setup: Setup, tp: int | None, ep: int | None, bucket_bytes: int, meta: bool) -> dict:
    """Refit before and after an update; both times the rollout model computes what the training model does."""
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit
    from megatron_dlm.training.step import train_step

    state = train_model(setup)
    groups = rollout_groups(state.groups, tp, ep)
    model = rollout_model(setup, groups, meta)
    model.register_buffer("cache", torch.zeros(3))
    refit = Refit(state, model, bucket_bytes, verify=True)
    count = 4 * (state.groups.pp_size if setup.virtual else 1)
    errors, seen = [], []
    for update in range(2):
        for _ in range(2 * update):  # the first update warms up, with a rate of 0
            train_step(state, share(state, rows(count)), forward_step, LENGTH)
        report = refit.run()
        found, expected = rollout_logits(model), trained_logits(state)
        errors.append((found - expected).abs().max().item())
        seen.append(found)
    assert model.cache.tolist() == [0, 0, 0]
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    trained = {tensor.data_ptr() for chunk in state.unwrapped_chunks() for tensor in chunk.parameters()}
    experts = [tensor.data_ptr() in trained for name, tensor in model.named_parameters() if ".experts." in name]
    others = [tensor.data_ptr() in trained for name, tensor in model.named_parameters() if ".experts." not in name]
    sizes = [tensor.nbytes for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name != "cache"]
    return {
        "errors": errors,
        "learned": (seen[1] - seen[0]).abs().max().item(),
        "report": report,
        "total": sum(sizes),
        "largest": max(sizes),
        "experts": experts,
        "others": others,
        "batches": len(refit.batches),
        "biases": {name: value for name, value in model.named_buffers() if name.endswith("expert_bias")},
    }


def kept_apart() -> None:
    """In the layout of training, on one rank, and yet nothing is shared: updates are not seen before the next refit."""
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit
    from megatron_dlm.training.step import train_step

    state = train_model(Setup())
    model = rollout_model(Setup(), rollout_groups(state.groups, 1, 1))
    refit = Refit(state, model, verify=True, share=False)
    report = refit.run()
    assert (report.received, report.shared) == (0, 0)
    assert report.copied == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    before = rollout_logits(model)
    assert torch.equal(before, trained_logits(state))
    for _ in range(2):
        train_step(state, share(state, rows(4)), forward_step, LENGTH)
    assert torch.equal(rollout_logits(model), before) and not torch.equal(trained_logits(state), before)
    refit.run()
    assert torch.equal(rollout_logits(model), trained_logits(state))


def test_an_engine_can_have_storage_of_its_own() -> None:
    pool(1).run(kept_apart)


MOVED = {
    "tp2 pp2 to tp1": (4, Setup(tp=2, pp=2), 1, None),
    "tp1 to tp2": (2, Setup(), 2, None),
    "tp2 to tp1": (2, Setup(tp=2), 1, None),
    "tp4 to tp2": (4, Setup(tp=4), 2, None),
    "tp2 sp to tp1": (2, Setup(tp=2, sequence_parallel=True), 1, None),
    "pp2 to tp2": (2, Setup(pp=2), 2, None),
    "pp2": (2, Setup(pp=2), None, None),
    "pp2 tied": (2, Setup(pp=2, tied=True), None, None),
    "tp2 pp2": (4, Setup(tp=2, pp=2), None, None),
    "pp2 in chunks": (2, Setup(pp=2, virtual=2), None, None),
    "pp2 in chunks to tp2": (2, Setup(pp=2, virtual=2), 2, None),
    "dp2 overlap to tp2": (2, Setup(distributed=True, overlap=True), 2, None),
    "pp2 dp2 overlap": (4, Setup(pp=2, distributed=True, overlap=True), None, None),
    "ep2 to ep1": (2, Setup(ep=2, experts=4), None, 1),
    "ep2 bias to ep1": (2, Setup(ep=2, experts=4, expert_bias=True), None, 1),
    "pp2 ep2 to ep1": (4, Setup(pp=2, ep=2, experts=4, expert_bias=True), None, 1),
    "pp2 ep2": (4, Setup(pp=2, ep=2, experts=4), None, None),
    "tp2 ep2 to tp1 ep1": (2, Setup(tp=2, ep=2, experts=4, sequence_parallel=True), 1, 1),
    "tp2 experts to tp1": (2, Setup(tp=2, experts=4, sequence_parallel=True), 1, None),
    "pp2 experts": (2, Setup(pp=2, experts=4, expert_bias=True), None, None),
    "pp2 bf16": (2, Setup(pp=2, bf16=True), None, None),
    "tp2 sp bf16 to tp1": (2, Setup(tp=2, sequence_parallel=True, bf16=True), 1, None),
    "dp2 overlap bf16 to tp2": (2, Setup(distributed=True, overlap=True, bf16=True), 2, None),
    "pp2 experts bf16": (2, Setup(pp=2, experts=4, expert_bias=True, bf16=True), None, None),
    "ep2 bias bf16 to ep1": (2, Setup(ep=2, experts=4, expert_bias=True, bf16=True), None, 1),
}
ROUNDING = 0.02  # of logits of a bf16 model, where a matrix is multiplied in one piece or in two


@pytest.mark.parametrize("case", MOVED)
def test_the_rollout_model_computes_what_the_training_model_does(case: str) -> None:
    world, setup, tp, ep = MOVED[case]
    error, change = (ROUNDING, 2 * ROUNDING) if setup.bf16 and tp is not None else (1e-5, 1e-3)
    for answer in pool(world).run(carried, setup, tp, ep, BUCKET, True):
        report = answer["report"]
        assert max(answer["errors"]) < error and answer["learned"] > change
        assert report.moved > 0 and report.seconds > 0
        assert report.moved + report.shared == answer["total"]  # nothing is written twice, nothing left out
        assert answer["batches"] >= report.received / BUCKET
        assert len({str(bias.tolist()) for bias in answer["biases"].values()}) == (4 if setup.expert_bias else 0)


@pytest.mark.parametrize("case", ["tp2 pp2 to tp1", "pp2 experts", "ep2 bias to ep1"])
@pytest.mark.parametrize("bucket_bytes", [2000, 2**29])
def test_the_size_of_the_bucket_changes_nothing(case: str, bucket_bytes: int) -> None:
    world, setup, tp, ep = MOVED[case]
    for answer in pool(world).run(carried, setup, tp, ep, bucket_bytes, False):
        assert max(answer["errors"]) < 1e-5
        assert answer["batches"] == 1 if bucket_bytes == 2**29 else answer["batches"] > 10


SHARED = {
    "1": (1, Setup(), None),
    "1 tied": (1, Setup(tied=True), None),
    "tp2": (2, Setup(tp=2), None),
    "dp2 overlap": (2, Setup(distributed=True, overlap=True), None),
    "ep2": (2, Setup(ep=2, experts=4), None),
    "ep1 to ep2": (2, Setup(experts=4), 2),  # every rank trains all experts, and its engine reads a half of them
    "experts": (1, Setup(experts=4, expert_bias=True), None),
}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("case", SHARED)
def test_what_a_rank_trains_does_not_move(case: str, meta: bool) -> None:
    world, setup, ep = SHARED[case]
    for answer in pool(world).run(carried, setup, None, ep, BUCKET, meta):
        assert max(answer["errors"]) < 1e-6 and answer["learned"] > 1e-3
        assert answer["report"].moved == 0 and answer["report"].shared == answer["total"]
        assert answer["batches"] == 0
        assert all(answer["experts"]) and all(answer["others"])


def test_where_only_experts_differ_only_those_of_other_ranks_move() -> None:
    for rank, answer in enumerate(pool(2).run(carried, *MOVED["ep2 bias to ep1"][1:], BUCKET, True)):
        assert all(answer["others"]) and answer["report"].copied == 0
        shared = [True] * 4 + [False] * 4  # both matrices of experts 0 and 1, then those of 2 and 3
        assert answer["experts"] == (shared if rank == 0 else shared[::-1]) * 4  # layers


def staged(setup: Setup, tp: int, bucket_bytes: int) -> list[int]:
    """Bytes that each batch submits on this rank."""
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit

    state = make(setup)
    refit = Refit(state, rollout_model(setup, rollout_groups(state.groups, tp)), bucket_bytes)
    sizes, run = [], refit.transport.run

    def counting() -> None:
        sizes.append(sum(message.tensor.nbytes for message in refit.transport.messages))
        run()

    refit.transport.run = counting
    refit.run()
    return sizes


@pytest.mark.parametrize("bucket_bytes", [1000, 10_000, 100_000])
def test_no_batch_stages_more_than_a_bucket(bucket_bytes: int) -> None:
    for sizes in pool(4).run(staged, Setup(tp=2, pp=2), 1, bucket_bytes):
        assert len(sizes) > 1 and sum(sizes) > bucket_bytes
        assert max(sizes) <= bucket_bytes


def corrupted(setup: Setup, tp: int | None, ep: int | None, name: str) -> str:
    from megatron_dlm.config.errors import TrainingError
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit
    from megatron_dlm.rollout.reshard_plan import canonical

    state = make(setup)
    model = rollout_model(setup, rollout_groups(state.groups, tp, ep))
    refit = Refit(state, model, verify=True)
    refit.run()
    share_, wanted = refit._share, canonical(name, 0)

    def swapped(training: dict) -> None:
        """What is copied from now on is not what is trained."""
        share_(training)
        if wanted in training:
            training[wanted] = training[wanted].detach().flip(0)

    refit._share = swapped
    with pytest.raises(TrainingError) as error:
        refit.run()
    return str(error.value)


@pytest.mark.parametrize(
    ("world", "setup", "tp", "ep", "name"),
    [
        (2, Setup(tp=2), 1, None, "decoder.layers.2.mlp.linear_fc2.weight"),
        (2, Setup(), 2, None, "decoder.layers.1.self_attention.linear_qkv.weight"),
        (2, Setup(ep=2, experts=4), None, 1, "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"),
    ],
)
def test_the_check_finds_a_parameter_that_is_not_as_trained(world, setup, tp, ep, name: str) -> None:
    for message in pool(world).run(corrupted, setup, tp, ep, name):
        assert name in message


def replaced(setup: Setup) -> None:
    """Storage of training parameters that moves, and parameters that are replaced."""
    from megatron_dlm.rollout.refit import Refit

    state = make(setup)
    model = rollout_model(setup, state.groups)
    refit = Refit(state, model)
    parameter = state.module.decoder.layers[0].self_attention.linear_qkv.weight
    parameter.data = parameter.data.clone() + 1
    assert torch.equal(model.decoder.layers[0].self_attention.linear_qkv.weight, parameter)
    state.module.decoder.final_layernorm.weight = torch.nn.Parameter(torch.full((setup.hidden,), 3.0))
    refit.run()
    assert model.decoder.final_layernorm.weight is state.module.decoder.final_layernorm.weight


def test_sharing_survives_what_moves_or_replaces_a_parameter() -> None:
    pool(1).run(replaced, Setup())


def differing(setup: Setup, other: Setup) -> str:
    from megatron_dlm.rollout.refit import Refit

    state = make(setup)
    with pytest.raises(ValueError) as error:
        Refit(state, rollout_model(other, state.groups))
    return str(error.value)


@pytest.mark.parametrize(
    ("other", "words"),
    [(Setup(hidden=64), "has shape"), (Setup(layers=6), "differ"), (Setup(float64=True), "casts nothing")],
)
def test_models_that_do_not_match_are_refused(other: Setup, words: str) -> None:
    assert words in pool(1).run(differing, Setup(), other)[0]


def test_fingerprints_add_up_however_a_tensor_is_cut() -> None:
    from megatron_dlm.rollout import refit_check
    from megatron_dlm.rollout.refit_check import fingerprint

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        whole = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = fingerprint(whole, (0, 0, 0), (6, 8, 5))
        for dim in range(3):
            halves = [whole.narrow(dim, 0, 2), whole.narrow(dim, 2, whole.shape[dim] - 2)]
            begins = [(0, 0, 0), tuple(2 if axis == dim else 0 for axis in range(3))]
            assert sum(map(fingerprint, halves, begins, [(6, 8, 5)] * 2)) % 2**64 == expected
        layers = [fingerprint(layer, (index, 0, 0), (6, 8, 5)) for index, layer in enumerate(whole)]
        assert sum(layers) % 2**64 == expected and len(set(layers)) == 6
        swapped = whole.clone()
        swapped[0, 0, 0], swapped[0, 0, 1] = whole[0, 0, 1], whole[0, 0, 0]
        assert fingerprint(swapped, (0, 0, 0), (6, 8, 5)) != expected
        for at_once in (1, 7, 40, 90):
            usual, refit_check._ELEMENTS_AT_ONCE = refit_check._ELEMENTS_AT_ONCE, at_once
            assert fingerprint(whole, (0, 0, 0), (6, 8, 5)) == expected
            refit_check._ELEMENTS_AT_ONCE = usual
    odd = refit_check._odd(torch.arange(10_000))
    assert (odd % 2 != 0).all() and len(set(odd.tolist())) > 9_990
    assert Counter((odd >> 40).remainder(4).tolist()).most_common()[-1][1] > 2_300
