"""The optimizer in host memory against the one on the device, through checkpoints, sleep and new beginnings.

On a CPU all memory is the host's; the paths are those of a device, only their two ends are one place.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness import pool

DISTRIBUTED = dict(use_distributed_optimizer=True)
EXPERTS = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16)
LAYOUTS = {
    "one": (1, {}, {}),
    "dp2 overlap": (2, dict(overlap_grad_reduce=True, overlap_param_gather=True), {}),
    "tp2": (2, dict(tensor_model_parallel_size=2), {}),
    "pp2": (2, dict(pipeline_model_parallel_size=2), {}),
    "ep2": (2, dict(expert_model_parallel_size=2), EXPERTS),
}
HOST = dict(optimizer_cpu_offload=True)
HALF = dict(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5, overlap_cpu_optimizer_d2h_h2d=True)


def make(parallel: dict, sizes: dict, offload: dict, value: bool = False):
    """A bf16 state over the layout, with its weights drawn by name."""
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import Words, model_config, vocabulary

    settings = ParallelConfig(**parallel, **DISTRIBUTED)
    model = model_config(bf16=True, **sizes)
    session = Session(model, settings, Words(), initialize(settings, seed=1), vocabulary())
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5, **offload)
    return (session.value_state if value else session.train_state)(optimizer, 10)


def update(state, count: int) -> None:
    from megatron_dlm.training.step import train_step
    from tests.parallel.test_equivalence import sft_rows

    rows, forward, length = sft_rows(state)
    for _ in range(count):
        assert train_step(state, rows, forward, length).update_successful
    state.gather_parameters()


def weights(state) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, parameter in state.named_parameters()]


def masters(state) -> list[torch.Tensor]:
    """Master weights and moments, which show what bf16 hides; in the order of the optimizer's parameters."""
    from megatron_dlm.training.host_optimizer import MASTER, is_on_host

    found = []
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for parameter in itertools.chain.from_iterable(group["params"] for group in part.optimizer.param_groups):
            kept = part.optimizer.state[parameter]
            master = kept[MASTER] if is_on_host(part.optimizer) else parameter
            found += [master.detach().clone(), *(kept[name].clone() for name in ("exp_avg", "exp_avg_sq", "step"))]
    return found


def trained(parallel: dict, sizes: dict, offload: dict, sleeps: bool = False) -> tuple:
    from megatron_dlm.training.sleep import asleep, sleep, wake

    state = make(parallel, sizes, offload)
    before = weights(state)
    for _ in range(3):
        update(state, 1)
        if sleeps:
            sleep(state)
            assert asleep(state)
            wake(state)
    assert not any(torch.equal(one, other) for one, other in zip(before, weights(state)) if one.norm())
    return [one.float().numpy() for one in weights(state)], [one.numpy() for one in masters(state)]


def equal(found: tuple, expected: tuple) -> bool:
    """Bit by bit."""
    return all(len(one) == len(other) and all(map(np.array_equal, one, other)) for one, other in zip(found, expected))


def close(found: tuple, expected: tuple) -> bool:
    """To the rounding of fp32 in masters and moments, which a bf16 weight shows where it stands between two numbers."""
    near = lambda one, other, tolerance: np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    (weights, kept), (other_weights, others) = found, expected
    assert len(weights) == len(other_weights) and len(kept) == len(others)
    return all(near(*pair, 1e-3) for pair in zip(weights, other_weights)) and all(
        near(*pair, 1e-5) for pair in zip(kept, others)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_are_those_of_the_device(layout: str) -> None:
    world, parallel, sizes = LAYOUTS[layout]
    expected = pool(world).run(trained, parallel, sizes, {})
    for offload in (HOST, HALF) if layout in ("one", "ep2") else (HALF,):
        for one, other in zip(pool(world).run(trained, parallel, sizes, offload), expected, strict=True):
            assert close(one, other)


@pytest.mark.parametrize("offload", [HOST, HALF])
def test_sleep_changes_nothing(offload: dict) -> None:
    assert equal(pool(1).run(trained, {}, {}, offload, True)[0], pool(1).run(trained, {}, {}, offload)[0])


def saved(parallel: dict, offload: dict, folder: Path) -> list[torch.Tensor]:
    """Two updates, a checkpoint, two more."""
    from megatron_dlm.checkpoint.distributed import save

    state = make(parallel, {}, offload)
    save(state, folder / "0", 0, {})  # before there is any state
    update(state, 2)
    save(state, folder / "2", 2, {})
    update(state, 2)
    return [one.float().numpy() for one in weights(state)], [one.numpy() for one in masters(state)]


def resumed(parallel: dict, offload: dict, folder: Path, at: int) -> tuple:
    from megatron_dlm.checkpoint.distributed import load

    state = make(parallel, {}, offload)
    for parameter in state.module.parameters():
        parameter.data.fill_(0.5)
    load(state, folder / str(at))
    update(state, 4 - at)
    return [one.float().numpy() for one in weights(state)], [one.numpy() for one in masters(state)]


@pytest.mark.parametrize(("wrote", "reads"), [(HOST, HOST), (HOST, {}), ({}, HALF)])
def test_a_run_goes_on_from_its_checkpoint_wherever_the_optimizer_is(tmp_path, wrote: dict, reads: dict) -> None:
    expected = pool(2).run(saved, {}, wrote, tmp_path)
    for at in (0, 2):
        for one, other in zip(pool(2).run(resumed, {}, reads, tmp_path, at), expected, strict=True):
            assert (equal if wrote == reads else close)(one, other)


def began_anew(offload: dict, folder: Path) -> tuple:
    """Weights from a checkpoint without its optimizer, and an optimizer that forgets."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.state import forget_optimizer

    state = make({}, {}, offload)
    load(state, folder / "2", with_optimizer=False)
    loaded = weights(state)
    update(state, 1)
    moved = [(one.float() - other.float()).abs().max() for one, other in zip(weights(state), loaded)]
    assert max(moved) < 0.1  # an update of the loaded weights, and not of those before
    forget_optimizer(state)
    update(state, 1)
    return [one.float().numpy() for one in weights(state)], [one.numpy() for one in masters(state)]


def test_weights_that_are_loaded_alone_are_followed(tmp_path) -> None:
    pool(1).run(saved, {}, {}, tmp_path)
    expected = pool(1).run(began_anew, {}, tmp_path)[0]
    for offload in (HOST, HALF):
        assert close(pool(1).run(began_anew, offload, tmp_path)[0], expected)


def owed(offload: dict, value: bool) -> tuple[int, int, int]:
    """Bytes that the optimizer will take of the device before the first update, and after it; number of parameters."""
    from megatron_dlm.training.sleep import state_to_come

    state = make({}, {}, offload, value)
    before = state_to_come(state)
    if not value:
        update(state, 1)
    return before, state_to_come(state), sum(parameter.numel() for _, parameter in state.named_parameters())


@pytest.mark.parametrize("value", [False, True])
def test_the_device_is_to_keep_no_moments(value: bool) -> None:
    before, _, count = pool(1).run(owed, {}, value)[0]
    assert before == 8 * count
    before, after, _ = pool(1).run(owed, HOST, value)[0]
    assert before == after == 0
    before, after, _ = pool(1).run(owed, HALF, value)[0]
    assert 0 < before < 6 * count and (after == 0 or value)
