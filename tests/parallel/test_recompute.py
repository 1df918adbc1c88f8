"""Activations computed again in the backward pass: the same gradients, from fewer saved bytes.

Gradients are those of one process that keeps everything, in float64. What is saved for backward is counted as distinct
storages, without those of parameters.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import pool
from tests.parallel.jobs import EXPERTS, Job, assert_same, begin, gradients_of, make_state
from tests.parallel.test_equivalence import sft_rows

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
LAYERWISE = FULL | dict(recompute_num_layers=1)
BLOCK = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
SELECTIVE = dict(recompute_granularity="selective")
NORM_MLP = SELECTIVE | dict(recompute_modules=["layernorm", "mlp"])
NORM_MOE = SELECTIVE | dict(recompute_modules=["core_attn", "layernorm", "moe"])
SHARED = SELECTIVE | dict(recompute_modules=["core_attn", "shared_experts", "mlp"])
TP2_SP = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
MODELS: dict[str, dict] = {"dense": {}, "experts": EXPERTS}

CASES = {
    "full": (1, "dense", FULL),
    "block": (1, "dense", BLOCK),
    "selective": (1, "dense", SELECTIVE),
    "norm and mlp": (1, "dense", NORM_MLP),
    "experts, full": (1, "experts", LAYERWISE),
    "experts, norm and moe": (1, "experts", NORM_MOE),
    "experts, shared": (1, "experts", SHARED),
    "tp2 sp, full": (2, "dense", LAYERWISE | TP2_SP),
    "tp2 sp, norm and mlp": (2, "dense", NORM_MLP | TP2_SP),
    "tp2 sp, experts, norm and moe": (2, "experts", NORM_MOE | TP2_SP),
    "pp2, full": (2, "dense", FULL | PP2),
    "pp2, experts, selective": (2, "experts", SELECTIVE | PP2),
    "ep2, full": (2, "experts", LAYERWISE | dict(expert_model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Of both models: the weights, and the gradients of one process that keeps all activations."""
    found = {}
    for name, sizes in MODELS.items():
        folder, job = tmp_path_factory.mktemp(name) / "start", Job.of("sft", {}, sizes, True)
        pool(1).run(begin, job, folder)
        ((_, gradients, _),) = pool(1).run(gradients_of, job, folder)
        found[name] = folder, gradients
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same(plain, case: str) -> None:
    world, name, parallel = CASES[case]
    folder, expected = plain[name]
    for _, found, _ in pool(world).run(gradients_of, Job.of("sft", parallel, MODELS[name], True), folder):
        assert_same(found, expected, 1e-10)


def test_old_log_probabilities_are_the_same(plain) -> None:
    """They come of passes without gradients, in which nothing is to be computed again."""
    folder, _ = plain["experts"]
    found = [
        pool(1).run(gradients_of, Job.of("tracerl", parallel, EXPERTS, True), folder)[0] for parallel in ({}, NORM_MOE)
    ]
    assert_same(found[1][1], found[0][1], 1e-10)


def saved_of(job: Job) -> tuple[int, bool, int]:
    """Of a forward pass over one row: bytes saved for backward, whether a mask is among them, and T x hidden bytes."""
    state = make_state(job, False)
    rows, forward, length = sft_rows(state)
    state.module.train()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output, loss_fn = forward(rows[0], state.chunks[0])
        loss = loss_fn(output)[0]
    assert loss.requires_grad
    weights = {parameter.untyped_storage()._cdata for parameter in state.module.parameters()}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in kept}
    total = sum(storage.nbytes() for key, storage in storages.items() if key not in weights)
    shapes = [tensor.shape for tensor in kept if tensor.ndim == 4]  # an attention kernel may keep masks as numbers
    masked = any(shape[1] == 1 and shape[2] == shape[3] for shape in shapes)
    return total, masked, length * state.config.hidden_size * 8


def saved(parallel: dict, sizes: dict) -> tuple[int, bool, int]:
    return pool(1).run(saved_of, Job.of("sft", parallel, sizes, True))[0]


@pytest.mark.parametrize(("name", "parts"), [("dense", NORM_MLP), ("experts", NORM_MOE), ("experts", SHARED)])
def test_the_more_is_computed_again_the_less_is_saved(name: str, parts: dict) -> None:
    settings = ({}, SELECTIVE, SELECTIVE | parts, LAYERWISE)
    everything, selective, more, full = (saved(parallel, MODELS[name]) for parallel in settings)
    assert everything[1] and not selective[1] and not full[1]  # masks stay with the row, and are not saved again
    assert everything[0] > selective[0] > full[0] and everything[0] > more[0] > full[0]


@pytest.mark.parametrize("name", MODELS)
def test_full_recomputation_saves_the_input_of_each_layer_and_nothing_else(name: str) -> None:
    few, _, line = saved(LAYERWISE, MODELS[name])
    many, _, _ = saved(LAYERWISE, MODELS[name] | dict(num_layers=8))
    in_pairs, _, _ = saved(FULL, MODELS[name] | dict(num_layers=8))
    assert many - few == 4 * line and in_pairs == few


def test_the_first_layers_alone() -> None:
    """`block` keeps what it does not compute again."""
    one, _, line = saved(BLOCK, {})
    two, _, _ = saved(BLOCK | dict(recompute_num_layers=2), {})
    none, _, _ = saved({}, {})
    assert none > one > two and one - two >= line
