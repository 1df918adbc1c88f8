from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dlm.config.errors import CheckpointError, ResourceError
from megatron_dlm.platform.megatron import COMMON
from tests.common_state import COMMON_IS_A_FILE
from tests.harness import pool
from tests.small_model import Setup, forward_step, make, rows, share, whole


def begin(setup: Setup, folder: Path) -> None:
    from megatron_dlm.checkpoint.distributed import save

    save(make(setup), folder, 0, {})


def steps(setup: Setup, folder: Path, first: int, count: int, save_at_end: bool = False, expect: dict | None = None):
    """Load the newest checkpoint, train on, and return the losses, the gradient norms and the whole weights."""
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.step import train_step

    state = make(setup)
    extra = load(state, folder)
    assert extra == (expect or {}), extra
    assert state.iteration == first
    results = [train_step(state, share(state, rows(4, seed=first + n)), forward_step, 16) for n in range(count)]
    if save_at_end:
        save(state, folder, state.iteration, {"seen": [1, 2], "name": "x"})
    state.gather_parameters()
    weights = whole(state, dict(state.named_parameters()))
    return [r.metrics["loss"] for r in results], [r.grad_norm for r in results], weights, state.learning_rate()


def close(one: tuple, other: tuple, tolerance: float = 1e-5) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1] == pytest.approx(other[1], rel=tolerance)
    assert one[3] == other[3]
    assert one[2].keys() == other[2].keys()
    for name, weight in one[2].items():
        assert (weight - other[2][name]).norm() <= tolerance * weight.norm().clamp(min=1), name


SETUPS = {
    "adam": (1, Setup()),
    "sgd momentum": (1, Setup(optimizer="sgd", momentum=0.9)),
    "bf16": (1, Setup(bf16=True)),
    "distributed": (2, Setup(distributed=True)),
    "distributed bf16": (2, Setup(distributed=True, bf16=True)),
    "distributed overlap": (2, Setup(distributed=True, overlap=True)),
    "tp2": (2, Setup(tp=2, sequence_parallel=True)),
    "pp2 tied": (2, Setup(pp=2, tied=True)),
}


@pytest.mark.parametrize("name", SETUPS)
def test_save_and_load_continue_as_if_uninterrupted(name: str, tmp_path: Path) -> None:
    world, setup = SETUPS[name]
    pool(world).run(begin, setup, tmp_path)
    uninterrupted = pool(world).run(steps, setup, tmp_path, 0, 4)[0]
    pool(world).run(steps, setup, tmp_path, 0, 2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000000",
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]
    resumed = pool(world).run(steps, setup, tmp_path, 2, 2, False, {"seen": [1, 2], "name": "x"})[0]
    assert resumed[0] == uninterrupted[0][2:]
    assert resumed[1] == uninterrupted[1][2:]
    for key, weight in resumed[2].items():
        assert torch.equal(weight, uninterrupted[2][key]), key
    assert resumed[3] == uninterrupted[3]


CHANGES = {
    "tp2 -> 1": (2, Setup(tp=2), 1, Setup()),
    "1 -> tp2pp2": (1, Setup(), 4, Setup(tp=2, pp=2)),
    "pp2 -> tp2": (2, Setup(pp=2), 2, Setup(tp=2)),
    "distributed dp2 -> dp1": (2, Setup(distributed=True), 1, Setup(distributed=True)),
    "distributed tp2dp2 -> pp2dp2": (4, Setup(tp=2, distributed=True), 4, Setup(pp=2, distributed=True)),
    "distributed 1 -> bf16-free tp2dp2": (
        1,
        Setup(distributed=True),
        4,
        Setup(tp=2, sequence_parallel=True, distributed=True),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_layout_continues_alike(name: str, tmp_path: Path) -> None:
    world, setup, new_world, new_setup = CHANGES[name]
    pool(world).run(begin, setup, tmp_path)
    pool(world).run(steps, setup, tmp_path, 0, 2, True)
    extra = {"seen": [1, 2], "name": "x"}
    close(
        pool(world).run(steps, setup, tmp_path, 2, 2, False, extra)[0],
        pool(new_world).run(steps, new_setup, tmp_path, 2, 2, False, extra)[0],
    )


def weights_only(folder: Path, bf16: bool) -> None:
    from megatron_dlm.checkpoint.distributed import load, save
    from megatron_dlm.training.step import train_step

    state = make(Setup(bf16=bf16))
    train_step(state, rows(4), forward_step, 16)
    train_step(state, rows(4), forward_step, 16)
    save(state, folder, 2, {"a": 1}, with_optimizer=False)
    wanted = {name: value.detach().clone() for name, value in state.named_parameters()}
    train_step(state, rows(4), forward_step, 16)
    assert load(state, folder, with_optimizer=False) == {"a": 1}
    assert state.iteration == 2
    for name, value in state.named_parameters():
        assert torch.equal(value, wanted[name]), name
        if bf16:
            assert torch.equal(value.main_param, wanted[name].float()), name
    with pytest.raises(CheckpointError, match="no optimizer state"):
        load(state, folder)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_without_optimizer(bf16: bool, tmp_path: Path) -> None:
    pool(1).run(weights_only, tmp_path, bf16)


def refusals(folder: Path) -> None:
    from megatron_dlm.checkpoint.distributed import load, save

    state = make(Setup())
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load(state, folder / "nowhere")
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load(state, folder)
    save(state, folder, 5, {})
    with pytest.raises(CheckpointError, match="iter_0000007 is missing"):
        load(state, folder, iteration=7)


def misfits(folder: Path, setup: Setup, message: str) -> None:
    from megatron_dlm.checkpoint.distributed import load

    with pytest.raises(CheckpointError, match=message):
        load(make(setup), folder)


def test_refusals(tmp_path: Path) -> None:
    pool(1).run(refusals, tmp_path)
    pool(1).run(misfits, tmp_path, Setup(hidden=64), "has shape")
    pool(1).run(misfits, tmp_path, Setup(layers=6), "has shape|has no weight")
    pool(1).run(misfits, tmp_path, Setup(optimizer="sgd"), "written by the optimizer 'adam'")
    pool(2).run(misfits, tmp_path, Setup(distributed=True), "this run uses 'distributed adam'")


def test_expert_parallel_optimizer_state_stays_expert_parallel(tmp_path: Path) -> None:
    pool(1).run(begin, Setup(experts=4), tmp_path)
    pool(2).run(misfits, tmp_path, Setup(experts=4, ep=2), "this run uses 'expert-parallel adam'")


def refused_by_check(folder: Path) -> None:
    from megatron_dlm.checkpoint.distributed import load, save

    state = make(Setup())
    save(state, folder, 3, {"stage": "x"})
    before = {name: value.detach().clone() for name, value in state.named_parameters()}
    with torch.no_grad():
        for value in state.chunks[0].parameters():
            value.zero_()

    def check(extra: dict) -> None:
        raise CheckpointError(f"stage {extra['stage']} is not ours")

    with pytest.raises(CheckpointError, match="stage x is not ours"):
        load(state, folder, check=check)
    assert all(not value.any() for _, value in state.named_parameters())
    load(state, folder, check=lambda extra: None)
    assert all(torch.equal(value, before[name]) for name, value in state.named_parameters())


def test_a_caller_can_refuse_before_anything_is_read(tmp_path: Path) -> None:
    pool(1).run(refused_by_check, tmp_path)


def damaged(folder: Path, what: str, message: str) -> None:
    from megatron_dlm.checkpoint.distributed import load, save

    state = make(Setup())
    save(state, folder, 1, {})
    inside = folder / "iter_0000001"
    shards = sorted(inside.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if what == "missing shard":
        shards[-1].unlink()
    elif what == "short shard":
        shards[-1].write_bytes(shards[-1].read_bytes()[: shards[-1].stat().st_size // 2])
    elif what == "short common.pt":
        (inside / COMMON).write_bytes((inside / COMMON).read_bytes()[:100])
    elif what == "empty common.pt":
        (inside / COMMON).write_bytes(b"")
    elif what == "missing common.pt":
        (inside / COMMON).unlink()
    elif what == "short .metadata":
        (inside / ".metadata").write_bytes((inside / ".metadata").read_bytes()[:100])
    elif what == "missing .metadata":
        (inside / ".metadata").unlink()
    elif what == "of Megatron-LM":
        torch.save({"args": None, "iteration": 1}, inside / COMMON)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(state, folder)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("what", [
    "missing shard", "short shard", "short .metadata", "missing .metadata",
    *(["short common.pt", "empty common.pt", "missing common.pt"] if COMMON_IS_A_FILE else []),
])  # fmt: skip
def test_a_damaged_checkpoint_is_told_in_a_sentence(what: str, tmp_path: Path) -> None:
    pool(1).run(damaged, tmp_path, what, "iter_0000001 is damaged")


def test_a_checkpoint_of_another_package_is_told_in_a_sentence(tmp_path: Path) -> None:
    pool(1).run(damaged, tmp_path, "of Megatron-LM", "not written by this package")


def same_again(folder: Path) -> None:
    from megatron_dlm.checkpoint import distributed, places

    state = make(Setup())
    distributed.save(state, folder, 4, {"n": 1})
    original, seen = places.shutil.rmtree, []

    def watch(path: Path, **options: object) -> None:
        seen.append(places.latest_iteration(folder) == 4 and (folder / "iter_0000004" / ".metadata").exists())
        original(path, **options)

    places.shutil.rmtree = watch
    try:
        distributed.save(state, folder, 4, {"n": 2})
    finally:
        places.shutil.rmtree = original
    assert seen == [True]  # after the exchange
    assert distributed.load(state, folder) == {"n": 2}
    exchange, places._exchange = places._exchange, lambda one, other: False  # a file system that cannot
    try:
        distributed.save(state, folder, 4, {"n": 3})
    finally:
        places._exchange = exchange
    assert distributed.load(state, folder) == {"n": 3}
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000004", "latest_checkpointed_iteration.txt"]


def test_the_same_iteration_can_be_saved_again(tmp_path: Path) -> None:
    pool(1).run(same_again, tmp_path)


def test_two_folders_change_names_in_one_step(tmp_path: Path) -> None:
    from megatron_dlm.checkpoint.places import _exchange

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not _exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["a"]
    assert not _exchange(tmp_path / "a", tmp_path / "missing")


def crash(folder: Path, where: str) -> None:
    from megatron_dlm.checkpoint import distributed, places
    from megatron_dlm.training.step import train_step

    state = make(Setup())
    distributed.save(state, folder, 0, {"n": 0})
    before = {name: value.detach().clone() for name, value in state.named_parameters()}
    train_step(state, rows(4), forward_step, 16)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    owner, name = {
        "write": (distributed.dist_checkpointing, "save"),
        "move": (distributed, "put_in_place"),
        "name": (distributed, "name_as_latest"),
    }[where]
    original = getattr(owner, name)
    setattr(owner, name, fail)
    try:
        with pytest.raises((OSError, ResourceError), match="disk full"):
            distributed.save(state, folder, 1, {"n": 1})
    finally:
        setattr(owner, name, original)
    assert places.latest_iteration(folder) == 0
    assert distributed.load(state, folder) == {"n": 0}
    for name, value in state.named_parameters():
        assert torch.equal(value, before[name])
    distributed.save(state, folder, 1, {"n": 2})  # and the next save is not disturbed by the remains
    assert distributed.load(state, folder) == {"n": 2}


@pytest.mark.parametrize("where", ["write", "move", "name"])
def test_a_failed_save_leaves_the_previous_one_in_use(where: str, tmp_path: Path) -> None:
    pool(1).run(crash, tmp_path, where)


@pytest.mark.parametrize(
    "current, count, left",
    [(6, 2, [4, 6, 8]), (6, 1, [6, 8]), (6, 9, [2, 4, 6, 8]), (8, 2, [6, 8]), (2, 1, [2, 4, 6, 8])],
)
def test_keep_newest(tmp_path: Path, current: int, count: int, left: list[int]) -> None:
    """The one just written stays, and so do later ones, which belong to a run that this one has gone back behind."""
    from megatron_dlm.checkpoint.places import iteration_folder, keep_newest

    for iteration in (2, 4, 6, 8):
        iteration_folder(tmp_path, iteration).mkdir()
    (tmp_path / "iter_last").mkdir()
    gone = keep_newest(tmp_path, current, count)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"iter_{n:07d}" for n in left] + ["iter_last"]
    assert gone == [n for n in (2, 4, 6, 8) if n not in left]


def with_files(folder: Path) -> tuple[dict, str]:
    from megatron_dlm.checkpoint import distributed, places

    state = make(Setup())
    distributed.save(state, folder, 3, {"n": 3}, add_files=lambda path: (path / "words").write_text("hello"))
    distributed.save(state, folder, 5, {"n": 5})
    found = places.find(folder, 3)
    return distributed.read_extra(found), (found / "words").read_text(), distributed.read_extra(places.find(folder))


def test_a_checkpoint_carries_what_its_writer_adds(tmp_path: Path) -> None:
    """And it can be read without a model."""
    assert pool(1).run(with_files, tmp_path) == [({"n": 3}, "hello", {"n": 5})]
