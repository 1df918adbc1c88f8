"""Layers of Transformer Engine against the local ones, through megatron-core's own wrappers.

The package itself is a stand-in in plain torch (tests/stand_in), so what is tested is the layer that is built, the
names and places of its weights, and what runs in an FP8 context; not what FP8 does to numbers.
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
    "tp2 sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True), EXPERTS),
    "pp2": (2, dict(pipeline_model_parallel_size=2), dict(add_qkv_bias=True)),
    "ep2": (2, dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1), EXPERTS),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_values_gradients_checkpoints_and_refits_are_those_of_local_layers(case: str, tmp_path: Path) -> None:
    world, layout, sizes = LAYOUTS[case]
    pool(world, STAND_IN).run(there_and_back, layout, sizes, tmp_path)


def in_fp8(layout: dict, sizes: dict) -> tuple[dict, dict]:
    """Of each product with a layer's weights (and any other module that could run in FP8), by name: in which contexts
    it ran in an update. And what else was seen.
    """
    import transformer_engine.pytorch as te

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.diffusion.planner import row_multiple
    from megatron_dlm.training.optimizer import whose
    from megatron_dlm.training.sleep import sleep
    from megatron_dlm.training.state import global_names
    from megatron_dlm.training.step import train_step

    te.attention.rope.calls.clear()
    te.fp8.FP8GlobalStateManager.groups.clear()
    state = make_state(layout, sizes, with_optimizer=True, dtype=torch.bfloat16)
    rows, forward, length = sft_rows(state, row_multiple(state.groups.tp_size, ParallelConfig(**layout).token_multiple))
    train_step(state, rows, forward, length)
    ran = {}
    for chunk in state.unwrapped_chunks():
        rename = global_names(chunk)
        for name, module in chunk.named_modules():
            if hasattr(module, "ran"):
                ran[rename(name)] = set(module.ran)
    sleep(state)
    copies = [module for module in state.module.modules() if getattr(module, "_fp8_workspaces", None)]
    return ran, dict(
        sizes={group.size() for group in te.fp8.FP8GlobalStateManager.groups if group is not None},
        turned=len(te.attention.rope.calls),
        optimizer=whose(state.optimizer),
        copies=len(copies),
        rows=len(rows),
    )


PRODUCTS = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
OF_EXPERTS = {
    *("self_attention.linear_qkv", "self_attention.linear_proj"),
    *("mlp.experts.linear_fc1", "mlp.experts.linear_fc2"),
    *("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"),
}


def layer_of(name: str) -> tuple[int, str]:
    prefix, layers, number, rest = name.split(".", 3)
    assert (prefix, layers) == ("decoder", "layers")  # no head, no embedding
    return int(number), rest


def merge(results: list) -> dict[tuple[int, str], set]:
    found: dict[tuple[int, str], set] = {}
    for ran, _ in results:
        for name, contexts in ran.items():
            found.setdefault(layer_of(name), set()).update(contexts)
    return found


def test_all_products_of_layers_run_in_fp8_and_nothing_else() -> None:
    layout = dict(**FP8, tensor_model_parallel_size=2, sequence_parallel=True)
    results = pool(2, STAND_IN).run(in_fp8, layout, {})
    found = merge(results)
    assert set(found) == {(layer, name) for layer in range(4) for name in PRODUCTS}
    assert all(contexts == {(True, "Float8CurrentScaling")} for contexts in found.values())
    seen = results[0][1]
    assert seen["turned"] == 2 * 4 * seen["rows"]  # queries and keys of each layer, by the fused kernel
    assert seen["optimizer"] == "FusedAdam of Transformer Engine"
    assert seen["copies"] == 0  # a sleeping model keeps no weights in FP8
    assert seen["sizes"] == {2}  # scales are those of all ranks of the model


def test_the_first_and_the_last_layers_run_in_bf16_on_any_stage() -> None:
    layout = dict(
        **FP8,
        fp8_recipe="blockwise",
        pipeline_model_parallel_size=2,
        first_last_layers_bf16=True,
        num_layers_at_end_in_bf16=2,
    )
    found = merge(pool(2, STAND_IN).run(in_fp8, layout, {}))
    for (layer, _), contexts in found.items():
        assert contexts == ({(True, "Float8BlockScaling")} if layer == 1 else {(False, "")})


def test_layers_that_are_computed_again_do_so_in_fp8() -> None:
    again = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    for recipe, name in (("delayed", "TEDelayedScaling"), ("tensorwise", "Float8CurrentScaling")):
        ((found, _),) = pool(1, STAND_IN).run(in_fp8, dict(**FP8, **again, fp8_recipe=recipe), EXPERTS)
        for full_name, contexts in found.items():
            assert contexts == {(True, name)}, full_name
        assert {rest for layer, rest in map(layer_of, found) if layer} == OF_EXPERTS
        assert {rest for layer, rest in map(layer_of, found) if not layer} == PRODUCTS


def test_nothing_runs_in_fp8_unless_asked() -> None:
    ((found, _),) = pool(1, STAND_IN).run(in_fp8, TE, {})
    assert all(contexts == {(False, "")} for contexts in found.values()) and len(found) == 16


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


def kept_in_fp8(folder: Path) -> None:
    """Weights in FP8 with exact masters: updates, sleep, refit, and a run that goes on from its checkpoint."""
    from megatron.core.fp8_utils import is_float8tensor

    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.sleep import sleep
    from megatron_dlm.training.step import train_step

    layout = dict(**FP8, fp8_param_gather=True, use_distributed_optimizer=True)
    made = lambda: make_state(layout, {}, with_optimizer=True, dtype=torch.bfloat16)

    def steps(state, count: int) -> None:
        rows, forward, length = sft_rows(state, 128)
        for _ in range(count):
            train_step(state, rows, forward, length)
            sleep(state)

    local = make_state(dict(use_distributed_optimizer=True), {}, dtype=torch.bfloat16)
    save(local, folder / "local", 0, {}, with_optimizer=False)
    exact = sum(parameter.double().square().sum() for _, parameter in local.named_parameters())
    state = made()
    load(state, folder / "local", with_optimizer=False)
    masters = sum(shard.double().square().sum() for group in state.optimizer.param_groups for shard in group["params"])
    rounded = sum(parameter.double().square().sum() for _, parameter in state.named_parameters())
    torch.distributed.all_reduce(masters)
    assert masters.item() == pytest.approx(exact.item(), rel=1e-9)
    assert rounded.item() != pytest.approx(exact.item(), rel=1e-6)
    kept = {name for name, parameter in state.named_parameters() if is_float8tensor(parameter)}
    assert {layer_of(name.removesuffix(".weight"))[1] for name in kept} == PRODUCTS and len(kept) == 16
    start = weights(state)
    steps(state, 2)
    save(state, folder / "fp8", 2, {})
    saved = weights(state)
    assert all(not torch.equal(saved[name], start[name]) for name in kept)
    refitted(state, {}, torch.bfloat16)
    steps(state, 1)
    expected = weights(state)
    other = made()
    load(other, folder / "fp8")
    found = weights(other)
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    steps(other, 1)
    found = weights(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_that_are_kept_in_fp8(tmp_path: Path) -> None:
    pool(2, STAND_IN).run(kept_in_fp8, tmp_path)
