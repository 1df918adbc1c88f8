"""Layers of Transformer Engine against the local ones, through megatron-core's own wrappers.

The package itself is a stand-in in plain torch (tests/stand_in), so what is tested is the layer that is built, the
names and places of its weights, and its gradients (test_te_fp8.py: what runs in FP8).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import STAND_IN, pool
from tests.parallel.test_equivalence import sft_rows
from tests.tiny import model_config

EXPERTS = dict(
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    moe_first_k_dense=1,
    moe_shared_expert_intermediate_size=32,
)
SIZES = dict(num_layers=4, ffn_hidden_size=64, init_method_std=0.2, max_position_embeddings=64)
TE = dict(transformer_impl="transformer_engine")
FP8 = dict(**TE, fp8_format="hybrid")


def make_state(layout: dict, sizes: dict, with_optimizer: bool = False, dtype: torch.dtype = torch.float32):
    """A TrainState of this layout, which the process joins unless it is in one."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel import groups as process_groups
    from megatron_dlm.training.state import TrainState

    parallel = ParallelConfig(**layout)
    if dist.is_initialized() and parallel_state.model_parallel_is_initialized():
        process_groups.destroy(keep_world=True)
    groups, model = process_groups.initialize(parallel, seed=1), model_config(**SIZES | sizes)
    config = transformer_config(model, parallel, dtype=dtype)

    def build(pre_process: bool, post_process: bool, vp_stage: int | None):
        return BlockDiffusionModel(
            config, model_shape(model), groups.pg_collection, pre_process, post_process, vp_stage
        )

    optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-3) if with_optimizer else None
    return TrainState.build(build, config, optimizer, parallel, groups, 10)


def disturbed(state):
    """The same with norms that are not ones, on all tensor-parallel ranks alike."""
    with torch.no_grad():
        for name, parameter in state.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.cos(torch.arange(parameter.numel()) + len(name)))
    return state


def canonical_names(state, tensors: dict) -> dict:
    from megatron_dlm.rollout.refit import _first_expert
    from megatron_dlm.rollout.reshard_plan import canonical

    return {canonical(name, _first_expert(state.module)): tensor for name, tensor in tensors.items()}


def learned(state) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of an update, and this rank's gradients under names that the two kinds of layers share."""
    from megatron_dlm.training.step import accumulate_gradients

    rows, forward, length = sft_rows(state)
    loss = accumulate_gradients(state, rows, forward, length)["loss"]
    return loss, canonical_names(state, {name: p.main_grad.clone() for name, p in state.named_parameters()})


def places(state) -> dict[tuple, torch.Tensor]:
    """This rank's weights by their places in the stored model, which importers and exporters go by."""
    from megatron_dlm.checkpoint.hf.importer import shards_of
    from megatron_dlm.checkpoint.hf.stored import place_of

    return {place_of(shard): shard.data.detach().clone() for shard in shards_of(state)}


def weights(state) -> dict[str, torch.Tensor]:
    return canonical_names(state, {name: parameter.detach().clone() for name, parameter in state.named_parameters()})


def there_and_back(layout: dict, sizes: dict, folder: Path) -> None:
    """Local -> checkpoint -> Transformer Engine -> checkpoint -> local, with a gradient on each side; then a refit."""
    from megatron_dlm.checkpoint.distributed import load, save

    local = disturbed(make_state(layout, sizes))
    save(local, folder / "local", 0, {}, with_optimizer=False)
    loss, gradients = learned(local)
    before, stored = weights(local), places(local)

    fused = make_state(layout | TE, sizes)
    load(fused, folder / "local", with_optimizer=False)
    found_loss, found = learned(fused)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() and (found[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
    found_stored = places(fused)
    assert found_stored.keys() == stored.keys()
    assert all(torch.equal(found_stored[place], stored[place]) for place in stored)
    refitted(fused, sizes)
    save(fused, folder / "fused", 0, {}, with_optimizer=False)

    again = make_state(layout, sizes)
    load(again, folder / "fused", with_optimizer=False)
    after = weights(again)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def refitted(state, sizes: dict, dtype: torch.dtype = torch.float32) -> None:
    """An engine of local layers, on one rank each, gets the weights; fingerprints say that they are the same."""
    from megatron.core.fp8_utils import is_float8tensor

    from megatron_dlm import platform
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit

    groups = rollout_groups(state.groups, 1, 1)
    model = model_config(**SIZES | sizes)
    options = dict(use_cpu_initialization=True, perform_initialization=False)
    config = transformer_config(model, ParallelConfig(), dtype, **options)
    with platform.cuda_calls_on_cpu(), torch.device("meta"):
        engine = BlockDiffusionModel(config, model_shape(model), groups.pg_collection).requires_grad_(False).eval()
    report = Refit(state, engine, verify=True).run()
    assert not any(is_float8tensor(parameter) for parameter in engine.parameters())
    total = sum(parameter.nbytes for parameter in engine.parameters())
    assert report.shared + report.moved == total and report.shared > 0
    if state.groups.world_size == 1:
        assert report.moved == 0  # under other names, and yet the same storage


LAYOUTS = {  # with EXPERTS the first layer has none
    "one process": (1, {}, EXPERTS),
    "tp2": (2, dict(tensor_model_parallel_size=2), dict(add_qkv_bias=True)),
    "tp2 sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True), EXPERTS),
    "pp2": (2, dict(pipeline_model_parallel_size=2), dict(add_qkv_bias=True)),
    "ep2": (2, dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1), EXPERTS),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_values_gradients_checkpoints_and_refits_are_those_of_local_layers(case: str, tmp_path: Path) -> None:
    world, layout, sizes = LAYOUTS[case]
    pool(world, STAND_IN).run(there_and_back, layout, sizes, tmp_path)


def with_one_kernel_for_swiglu() -> None:
    """What is compiled on a GPU, here without compilation."""
    from unittest import mock

    from megatron_dlm import platform
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.shape import transformer_config

    local = disturbed(make_state({}, EXPERTS))
    loss, gradients = learned(local)
    start = weights(local)
    fused = make_state(TE, EXPERTS | dict(transformer_overrides=dict(bias_activation_fusion=True)))
    with torch.no_grad():
        for name, parameter in canonical_names(fused, dict(fused.named_parameters())).items():
            parameter.copy_(start[name])
    with torch.compiler.set_stance("force_eager"):
        found_loss, found = learned(fused)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert gradient.norm() and (found[name] - gradient).norm() <= 2e-5 * gradient.norm(), name

    def taken(layers: dict, **overrides: object) -> bool:
        model = model_config(**SIZES, transformer_overrides=overrides)
        with mock.patch.object(platform, "is_cuda", lambda: True):
            return transformer_config(model, ParallelConfig(**layers)).bias_activation_fusion

    assert taken(TE) and taken(FP8) and not taken({})
    assert not taken(TE, activation_func_clamp_value=7.0)  # the kernel has none
    assert not taken(TE, use_te_activation_func=True) and not taken(TE, bias_activation_fusion=False)


def test_the_fused_swiglu_is_the_same_function() -> None:
    pool(1, STAND_IN).run(with_one_kernel_for_swiglu)


def compared() -> dict[str, float | str]:
    from benchmarks import fused_layers
    from megatron_dlm.platform import te

    te.require = lambda wanted: None  # the stand-in needs no GPU
    return fused_layers.differences(["te", "blockwise"])


def test_the_command_that_compares_on_a_gpu_runs_here() -> None:
    from benchmarks.fused_layers import bound_of

    (found,) = pool(1, STAND_IN).run(compared)
    assert len(found) == 12 and all(value <= bound_of(name) for name, value in found.items()), found
    assert all(found[f"blockwise, {kind}: loss"] == found[f"te, {kind}: loss"] for kind in ("dense", "experts"))


def resumed(layout: dict, folder: Path) -> None:
    """A run that was saved by the fused optimizer goes on as if it had not been."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.optimizer import whose
    from megatron_dlm.training.sleep import sleep
    from megatron_dlm.training.step import train_step

    def steps(state, count: int) -> None:
        rows, forward, length = sft_rows(state)
        for _ in range(count):
            train_step(state, rows, forward, length)
            sleep(state)

    state = make_state(layout, {}, with_optimizer=True, dtype=torch.bfloat16)
    assert whose(state.optimizer) == "FusedAdam of Transformer Engine"
    steps(state, 2)
    save(state, folder, 2, {})
    steps(state, 2)
    expected = weights(state)
    other = make_state(layout, {}, with_optimizer=True, dtype=torch.bfloat16)
    load(other, folder)
    steps(other, 2)
    found = weights(other)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_runs_of_the_fused_optimizer_resume(tmp_path: Path) -> None:
    pool(1, STAND_IN).run(resumed, TE, tmp_path)
