from __future__ import annotations

import pytest
import torch

from tests.harness import pool
from tests.small_model import LENGTH, Setup, forward_step, gpt, make, rows, share, transformer_config


def rollout_model(setup: Setup, groups) -> torch.nn.Module:
    """A model of the rollout layout: the tensor and expert sizes of `setup`, no pipeline."""
    from dataclasses import replace

    alone = replace(setup, pp=1)
    return gpt(alone, transformer_config(alone), groups)


def bound(setup: Setup, meta: bool) -> None:
    from megatron_dlm.rollout.refit import bind
    from megatron_dlm.training.step import train_step

    state = make(setup)
    with torch.device("meta" if meta else "cpu"):
        model = rollout_model(setup, state.groups)
    if meta:
        model.to("meta")
    model.register_buffer("cache", torch.zeros(3))
    bind(state.module, model)
    assert model.cache.tolist() == [0, 0, 0]
    for _ in range(2):
        train_step(state, share(state, rows(2)), forward_step, LENGTH)
        state.gather_parameters()
        trained = dict(state.module.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == trained[name].data_ptr(), name
        with torch.no_grad():
            row = rows(1)[0]
            mask = torch.ones(LENGTH, LENGTH).tril().logical_not()[None, None]
            position = torch.arange(LENGTH)[None]
            assert torch.equal(model(row, position, mask), state.module(row, position, mask))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("world", "setup"),
    [(1, Setup()), (1, Setup(tied=True)), (2, Setup(tp=2)), (2, Setup(distributed=True, overlap=True))],
)
def test_bound_models_share_their_storage(world: int, setup: Setup, meta: bool) -> None:
    pool(world).run(bound, setup, meta)


def refit(setup: Setup, bucket_bytes: int) -> tuple:
    """Refit before and after an update; returns what the rollout model has, and what its stage trains."""
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit
    from megatron_dlm.training.step import train_step

    state = make(setup)
    groups = rollout_groups(state.groups)
    assert groups.pp_size == 1 and groups.tp_size == setup.tp
    model = rollout_model(setup, groups)
    for buffer in model.buffers():
        buffer.fill_(7)
    carry = Refit(state, model, bucket_bytes)
    carry.run()
    train_step(state, share(state, rows(4)), forward_step, LENGTH)
    for chunk in state.unwrapped_chunks():
        for name, buffer in chunk.named_buffers():
            buffer.fill_(float(10 * state.groups.pp_rank + int(name.split(".")[2])))  # stage and layer
    report = carry.run()
    expected_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert report.bytes == expected_bytes and report.seconds > 0
    state.gather_parameters()
    with torch.no_grad():
        mask = torch.ones(LENGTH, LENGTH).tril().logical_not()[None, None]
        logits = model(rows(1)[0], torch.arange(LENGTH)[None], mask)
    return (
        (groups.tp_rank, state.groups.ep_size and state.groups.pg_collection.ep.rank()),
        {name: value.detach().clone() for name, value in model.named_parameters()},
        {name: value.detach().clone() for name, value in state.named_parameters()},
        {name: value.clone() for name, value in model.named_buffers()},
        logits,
    )


CASES = {
    "1": (1, Setup()),
    "pp2": (2, Setup(pp=2)),
    "pp2 tied": (2, Setup(pp=2, tied=True)),
    "tp2 pp2": (4, Setup(tp=2, pp=2)),
    "tp2 sp pp2": (4, Setup(tp=2, pp=2, sequence_parallel=True)),
    "pp2 dp2 overlap": (4, Setup(pp=2, distributed=True, overlap=True)),
    "pp2 bf16": (2, Setup(pp=2, bf16=True)),
    "pp2 experts": (2, Setup(pp=2, experts=4, expert_bias=True)),
    "pp2 ep2 experts": (4, Setup(pp=2, ep=2, experts=4)),
}


@pytest.mark.parametrize("bucket_bytes", [1, 10_000, 2**28])
@pytest.mark.parametrize("case", CASES)
def test_rollout_model_has_the_trained_weights(case: str, bucket_bytes: int) -> None:
    world, setup = CASES[case]
    answers = pool(world).run(refit, setup, bucket_bytes)
    for place, rollout, _, _, _ in answers:
        trained: dict[str, torch.Tensor] = {}
        for other_place, _, parameters, _, _ in answers:
            if other_place == place:
                trained.update(parameters)
        assert rollout.keys() <= trained.keys()
        assert not trained.keys() - rollout.keys() - ({"output_layer.weight"} if setup.tied else set())
        for name, value in rollout.items():
            assert torch.equal(value, trained[name]), name


def test_buffers_travel_too() -> None:
    for answer in pool(2).run(refit, Setup(pp=2, experts=4, expert_bias=True), 2**28):
        biases = {name: set(value.tolist()) for name, value in answer[3].items() if name.endswith("expert_bias")}
        layer = "decoder.layers.{}.mlp.router.expert_bias".format
        assert biases == {layer(0): {0.0}, layer(1): {1.0}, layer(2): {10.0}, layer(3): {11.0}}


def differing(setup: Setup, other: Setup) -> None:
    from megatron_dlm.rollout.refit import Refit, bind

    state = make(setup)
    model = rollout_model(other, state.groups)
    with pytest.raises(ValueError, match="differ|has shape"):
        bind(state.module, model)
    with pytest.raises(ValueError, match="differ|has shape"):
        Refit(state, model)


@pytest.mark.parametrize("other", [Setup(hidden=64), Setup(layers=6)])
def test_models_that_do_not_match_are_refused(other: Setup) -> None:
    pool(1).run(differing, Setup(), other)


def test_buckets() -> None:
    from megatron_dlm.rollout.refit import _fill_buckets

    known = {name: ((size,), torch.uint8) for name, size in {"a": 4, "b": 4, "c": 3, "d": 9, "e": 1}.items()}
    owners = {"a": 0, "b": 0, "c": 0, "d": 0, "e": 1}
    filled = [(owner, names) for owner, _, names in _fill_buckets(list("aebcd"), owners, known, 8)]
    assert filled == [(0, ["a", "b"]), (1, ["e"]), (0, ["c"]), (0, ["d"])]
