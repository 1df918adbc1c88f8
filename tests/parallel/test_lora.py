"""Adapters in every layout against one process: gradients in float64, a step in fp32, and what a checkpoint carries."""

from __future__ import annotations

import pytest
import torch

from tests.harness import STAND_IN, pool
from tests.parallel.test_context import rows_of
from tests.small_model import whole
from tests.tiny import PAD_ID, model_config, vocabulary

RANK, ALPHA, LENGTH = 3, 6.0, 320


def make_state(parallel: dict, dtype: torch.dtype, with_lora: bool = True, train: bool = False):
    """A model of four layers in a layout, with adapters, and its TrainState."""
    from megatron_dlm.config.lora import LoraConfig
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.state import TrainState

    layout = ParallelConfig(**parallel)
    groups, model = initialize(layout, seed=1), model_config(num_layers=4, init_method_std=0.2)
    config = transformer_config(model, layout, dtype=dtype)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None):
        chunk = BlockDiffusionModel(
            config, model_shape(model), groups.pg_collection, pre_process, post_process, vp_stage
        )
        if with_lora:
            chunk.adapt(LoraConfig(RANK, ALPHA), seed=4)
        return chunk

    optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5) if train else None
    return TrainState.build(build, config, optimizer, layout, groups, 10)


def parts(state):
    """This rank's parts of four rows, and the length of each."""
    from megatron_dlm.diffusion.context import Sharing
    from megatron_dlm.diffusion.layout import Grid

    groups, grid = state.groups, Grid(4)
    rows = (rows_of(grid)[:2] * 2)[groups.data_rank :: groups.data_size]
    sharing = Sharing(groups.cp_size, groups.cp_rank, 4, 16 * groups.tp_size, PAD_ID, 0)
    mine = [sharing.part(row)[0] for row in rows]
    longest = max(len(row.tokens) for row in mine)
    assert all(len(row.tokens) == longest for row in mine)
    return mine, longest


def forward_step(row, model):
    from megatron_dlm.model.head import target_policy

    output = model.module.forward_row(row, headless=True)

    def loss_of(hidden):
        logprob, _ = target_policy(model.module, hidden, row.targets.label, 1.0, vocabulary(), 8)
        weight = torch.cos(row.targets.index.double() + row.targets.label.double()).to(logprob)
        return (weight * logprob).sum() + 0 * hidden.sum(), {}

    return output, loss_of


def begin(folder, plain) -> None:
    """Adapters that are far from nothing, beside the weights of a checkpoint without any."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.parallel.groups import destroy

    save(make_state({}, torch.float32, with_lora=False), plain, 0, {}, with_optimizer=False)
    destroy(keep_world=True)
    state = make_state({}, torch.float32)
    load(state, plain, with_optimizer=False)
    with torch.no_grad():
        for name, parameter in state.named_parameters():
            if name.endswith("lora.b"):
                parameter.copy_(0.2 * torch.sin(torch.arange(parameter.numel()).view_as(parameter) * 1.7))
    save(state, folder, 0, {}, with_optimizer=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    pool(1).run(begin, folder / "adapted", folder / "plain")
    return folder / "adapted", folder / "plain"


def gradients_of(parallel: dict, folder, dtype: torch.dtype = torch.float64):
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import accumulate_gradients

    state = make_state(parallel, dtype)
    load(state, folder, with_optimizer=False)
    rows, length = parts(state)
    loss = accumulate_gradients(state, rows, forward_step, length)["loss"]
    learn = {name: parameter for name, parameter in state.named_parameters() if parameter.requires_grad}
    return loss, whole(state, {name: parameter.main_grad for name, parameter in learn.items()})


def step_of(parallel: dict, folder):
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import train_step

    state = make_state(parallel, torch.float32, train=True)
    load(state, folder, with_optimizer=False)
    before = whole(state, dict(state.named_parameters()))
    rows, length = parts(state)
    result = train_step(state, rows, forward_step, length)
    state.gather_parameters()
    after = whole(state, dict(state.named_parameters()))
    return result.grad_norm, {name: after[name] - before[name] for name in after}


TP2, PP2 = dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)
SP = TP2 | dict(sequence_parallel=True)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
MLP = dict(recompute_granularity="selective", recompute_modules=["mlp"])
DISTRIBUTED = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS = {
    "tp2": TP2,
    "tp2 sp recomputed": SP | FULL,
    "pp2 in chunks, recomputed in part": PP2 | MLP | dict(num_virtual_stages_per_pipeline_rank=2),
    "cp2": dict(context_parallel_size=2),
}
TE = SP | dict(transformer_impl="transformer_engine")


@pytest.fixture(scope="module")
def alone(folders):
    return pool(1).run(gradients_of, {}, folders[0])[0], pool(1).run(step_of, {}, folders[0])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(layout: str, folders, alone) -> None:
    loss, expected = alone[0]
    assert len(expected) == 2 * 4 * 4 and all(".lora." in name and value.norm() > 0 for name, value in expected.items())
    for found_loss, found in pool(2).run(gradients_of, LAYOUTS[layout], folders[0]):
        assert found_loss == pytest.approx(loss, rel=1e-10)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-10 * value.norm(), name


def test_gradients_beside_layers_of_transformer_engine_are_those_beside_plain_ones(folders, alone) -> None:
    """Their adapters read what the fused norm gives; they are the same files."""
    loss, expected = alone[0]
    for found_loss, found in pool(2, STAND_IN).run(gradients_of, TE, folders[0], torch.float32):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.parametrize("layout", [DISTRIBUTED, SP], ids=["dp2 overlap", "tp2 sp"])
def test_a_step_is_that_of_one_process(layout: dict, folders, alone) -> None:
    """Adapters learn, and nothing else does."""
    norm, expected = alone[1]
    for found_norm, found in pool(2).run(step_of, layout, folders[0]):
        assert found_norm == pytest.approx(norm, rel=1e-5)
        for name, moved in expected.items():
            assert bool(moved.any()) == (".lora." in name), name
            assert (found[name] - moved).norm() <= 1e-4 * moved.norm(), name


def fresh(parallel: dict, plain, folder) -> None:
    """New adapters beside the weights of a checkpoint that has none."""
    from megatron_dlm.checkpoint.distributed import load, save

    state = make_state(parallel, torch.float32)
    load(state, plain, with_optimizer=False)
    save(state, folder, 0, {}, with_optimizer=False)


def trained(parallel: dict, folder, target=None):
    """Whole weights after a step, the second one after loading what another layout saved with its optimizer."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.step import train_step

    state = make_state(parallel, torch.float32, train=True)
    load(state, folder, with_optimizer=target is None)
    rows, length = parts(state)
    train_step(state, rows, forward_step, length)
    if target is not None:
        save(state, target, 0, {})
        train_step(state, rows, forward_step, length)
    state.gather_parameters()
    held = sum(
        tensor.numel()
        for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer])
        for kept in part.optimizer.state.values()
        for tensor in kept.values()
        if torch.is_tensor(tensor) and tensor.ndim
    )
    learn = sum(parameter.numel() for _, parameter in state.named_parameters() if parameter.requires_grad)
    return whole(state, dict(state.named_parameters())), held, learn


def test_new_adapters_are_the_same_in_every_layout_and_one_goes_on_in_another(folders, tmp_path) -> None:
    """And the optimizer holds two moments of each number of an adapter, and nothing of the rest."""
    from tests.test_stopping import tensors

    pool(1).run(fresh, {}, folders[1], tmp_path / "alone")
    pool(2).run(fresh, SP, folders[1], tmp_path / "tp2")
    one, other = (tensors(tmp_path / name / "iter_0000000") for name in ("alone", "tp2"))
    assert one.keys() == other.keys() and sum(".lora." in name for name in one) == 8
    assert all(torch.equal(one[name], other[name]) for name in one)
    expected, held, learn = pool(2).run(trained, SP, folders[0], tmp_path / "saved")[0]
    assert held == 2 * learn
    for found, *_ in pool(2).run(trained, PP2, tmp_path / "saved"):
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
