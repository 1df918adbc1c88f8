"""What runs in FP8 in layers of Transformer Engine, and what becomes of the copies that are kept in it.

The package is a stand-in (tests/stand_in), which knows of each product whether it ran in FP8, and rounds nothing but
weights that are kept so.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.harness import STAND_IN, pool
from tests.parallel.test_equivalence import sft_rows
from tests.parallel.test_te import EXPERTS, FP8, TE, make_state, refitted, weights


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
    assert seen["sizes"] == {2}  # delayed scales would be those of all ranks of the model


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


def with_copies(folder: Path) -> None:
    """Products read a copy of each weight that was made earlier. Whatever happens to weights, it must be made anew."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.sleep import sleep, wake
    from megatron_dlm.training.step import forward_only, train_step

    state = make_state(FP8, EXPERTS, with_optimizer=True, dtype=torch.bfloat16)
    rows, forward, length = sft_rows(state, 16)
    assert len(rows) > 1

    def losses() -> list[float]:
        return [float(loss) for loss, _ in forward_only(state, rows, forward, length)]

    def stale() -> bool:
        """Whether a pass differs from one without copies."""
        found = losses()
        kept = [module._fp8_workspaces for module in state.module.modules() if hasattr(module, "_fp8_workspaces")]
        assert kept and all(kept)
        for copies in kept:
            copies.clear()
        return found != losses()

    save(state, folder, 0, {}, with_optimizer=False)
    start = losses()
    train_step(state, rows, forward, length)
    assert not stale() and losses() != start
    sleep(state)
    assert not stale()
    wake(state)
    train_step(state, rows, forward, length)
    assert not stale()
    save(state, folder / "trained", 0, {}, with_optimizer=False)  # experts have been in FP8; there is nothing to say
    load(state, folder, with_optimizer=False)
    assert not stale() and losses() == start
    (chunk,) = state.chunks
    chunk.set_is_first_microbatch = lambda: None  # and so it would be seen
    train_step(state, rows, forward, length)
    assert stale()


def test_copies_of_weights_in_fp8_follow_the_weights(tmp_path: Path) -> None:
    pool(1, STAND_IN).run(with_copies, tmp_path)


def histories(state, stored: bool = False) -> dict[tuple, torch.Tensor]:
    """Of each product, and of each expert of it: what it knows of earlier steps, by its place in the whole model.

    Args:
        stored: only what this rank stores. (The stand-in does not reduce largest numbers over ranks.)
    """
    from megatron_dlm.checkpoint import fp8_history

    found = {}
    for chunk in state.unwrapped_chunks():
        for entry in fp8_history.to_save(chunk, chunk.sharded_state_dict()).values():
            if not (stored and any(entry.replica_id)):
                found |= {(entry.key, entry.global_offset, name): tensor for name, tensor in entry.data.items()}
    return found


def with_history(layout: dict, folder: Path, saves: bool) -> dict[tuple, torch.Tensor]:
    """Those of this rank, in a run that `delayed` scales and that was trained, or is loaded."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.step import train_step

    layout = FP8 | dict(fp8_recipe="delayed", fp8_amax_history_len=4) | layout
    state = make_state(layout, EXPERTS, with_optimizer=True, dtype=torch.bfloat16)
    rows, forward, length = sft_rows(state, 32)
    if saves:
        for _ in range(2):
            train_step(state, rows, forward, length)
        save(state, folder, 2, {})
        return histories(state, stored=True)
    load(state, folder, with_optimizer=False)
    found = histories(state)
    train_step(state, rows, forward, length)
    return found


def test_histories_of_another_length_have_the_newest_steps() -> None:
    from megatron_dlm.checkpoint.fp8_history import _of_length

    history = torch.tensor([[9.0], [3.0], [4.0], [5.0]])  # under way, then oldest to newest
    for steps, expected in {1: [9], 2: [9, 5], 3: [9, 4, 5], 4: [9, 3, 4, 5], 6: [9, 0, 0, 3, 4, 5]}.items():
        assert _of_length(history, steps).squeeze(1).tolist() == expected
    assert _of_length(history[:1], 3).squeeze(1).tolist() == [9, 0, 0]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="one process"),
        pytest.param(dict(tensor_model_parallel_size=2, sequence_parallel=True), id="TP2"),
        pytest.param(dict(pipeline_model_parallel_size=2), id="PP2"),
        pytest.param(dict(expert_model_parallel_size=2), id="EP2"),
    ],
)
def test_what_delayed_knows_of_earlier_steps_is_in_checkpoints(layout: dict, tmp_path: Path) -> None:
    """Saved by two processes, and read by one or two."""
    saved = {}
    for found in pool(2, STAND_IN).run(with_history, dict(expert_model_parallel_size=2), tmp_path, True):
        saved |= found
    assert any(history[0, 0] for (_, _, name), history in saved.items() if name.endswith("amax_history"))
    loaded = {}
    for found in pool(2 if layout else 1, STAND_IN).run(with_history, layout, tmp_path, False):
        loaded |= found
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[place], saved[place]) for place in saved)


def without_history(folder: Path) -> None:
    """A checkpoint of bfloat16 has none; histories start anew."""
    from megatron_dlm.checkpoint.distributed import load, save

    save(make_state({}, EXPERTS, dtype=torch.bfloat16), folder, 0, {}, with_optimizer=False)
    state = make_state(FP8 | dict(fp8_recipe="delayed"), EXPERTS, dtype=torch.bfloat16)
    load(state, folder, with_optimizer=False)
    assert not histories(state)


def test_a_checkpoint_without_histories_can_be_read(tmp_path: Path) -> None:
    pool(1, STAND_IN).run(without_history, tmp_path)


def kept_in_fp8(folder: Path) -> None:
    """Weights in FP8 with exact masters: updates, sleep, refit, and a run that goes on from its checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.fp8_utils import is_float8tensor

    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.ledger import Ledger, hold_state
    from megatron_dlm.training.sleep import sleep, wake
    from megatron_dlm.training.step import train_step

    layout = dict(**FP8, fp8_param_gather=True, use_distributed_optimizer=True)
    made = lambda **more: make_state(layout | more, {}, with_optimizer=True, dtype=torch.bfloat16)

    def stale(state) -> int:
        """Weights whose copies for the backward pass are those of other numbers."""
        kept = [parameter for _, parameter in state.named_parameters() if is_float8tensor(parameter)]
        return sum(not torch.equal(weight.for_backward, weight.dequantize()) for weight in kept)

    def steps(state, count: int) -> None:
        rows, forward, length = sft_rows(state, 128)
        for _ in range(count):
            train_step(state, rows, forward, length)
            sleep(state)

    local = make_state(dict(use_distributed_optimizer=True), {}, dtype=torch.bfloat16)
    with torch.no_grad():
        for _, parameter in local.named_parameters():
            parameter.mul_(1.4)  # not what another model starts from
    save(local, folder / "local", 0, {}, with_optimizer=False)
    exact = sum(parameter.double().square().sum() for _, parameter in local.named_parameters())
    state = made()
    in_fp8, read = [], dist_checkpointing.load

    def spy(content, *rest):
        in_fp8.extend(entry.key for entry in nested_values(content) if is_float8tensor(entry.data))
        return read(content, *rest)

    with mock.patch.object(dist_checkpointing, "load", spy):
        load(state, folder / "local", with_optimizer=False)
    assert not in_fp8  # megatron-core 0.19 reads into it as it is
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
    ledger = Ledger()
    hold_state(ledger, state)
    buffers = [buffer.param_data for chunk in state.chunks for buffer in chunk.buffers]
    assert {buffer.dtype for buffer in buffers} == {torch.bfloat16, torch.uint8}
    assert ledger.read().held["parameters"].device == sum(buffer.nbytes for buffer in buffers)
    refitted(state, {}, torch.bfloat16)
    steps(state, 1)
    expected = weights(state)
    other = made(overlap_param_gather=True)
    load(other, folder / "fp8")
    found = weights(other)
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert not stale(state) and not stale(other)
    steps(other, 1)
    assert stale(other)  # until the next forward pass, or
    other.gather_parameters()
    assert not stale(other)
    found = weights(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    moved = next(parameter for name, parameter in other.named_parameters() if name in kept)
    moved._data = moved._data.clone()  # while it sleeps; an engine may read the old place
    with pytest.raises(RuntimeError, match="were moved while their TrainState slept"):
        wake(other)


def exact_masters(folder: Path, sizes: dict) -> None:
    """Master copies are what a checkpoint has, not what is left of it in FP8; also after another row of the embedding
    was set.
    """
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.checkpoint.mask_embedding import MEAN, set_row

    local = make_state({}, sizes, dtype=torch.bfloat16)
    with torch.no_grad():
        for _, parameter in local.named_parameters():
            parameter.mul_(1.4)
    save(local, folder, 0, {}, with_optimizer=False)
    exact = sum(parameter.double().square().sum() for _, parameter in local.named_parameters())
    kept_so = dict(**FP8, fp8_param_gather=True, use_distributed_optimizer=True)
    state = make_state(kept_so, sizes, with_optimizer=True, dtype=torch.bfloat16)
    load(state, folder, with_optimizer=False)
    masters = [part for group in state.optimizer.param_groups for part in group["params"]]
    assert sum(part.double().square().sum() for part in masters).item() == pytest.approx(exact.item(), rel=1e-9)
    before = [part.clone() for part in masters]
    set_row(state, 1, 32, MEAN, seed=0)
    changed = [part.numel() for part, old in zip(masters, before) if not torch.equal(part, old)]
    tables = {id(state.module.embedding.word_embeddings.weight), id(state.module.output_layer.weight)}
    assert sorted(changed) == sorted(p.numel() for _, p in state.named_parameters() if id(p) in tables)


@pytest.mark.parametrize("sizes", [pytest.param({}, id="dense"), pytest.param(EXPERTS, id="experts")])
def test_masters_of_weights_in_fp8_are_exact(sizes: dict, tmp_path: Path) -> None:
    pool(1, STAND_IN).run(exact_masters, tmp_path, sizes)


def test_weights_that_are_kept_in_fp8(tmp_path: Path) -> None:
    pool(2, STAND_IN).run(kept_in_fp8, tmp_path)
