from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.harness import pool
from tests.small_model import LENGTH, VOCABULARY, Setup, forward_step, make, rows, share, whole


def write_start(setup: Setup, folder: Path) -> None:
    from megatron_dlm.checkpoint.distributed import save

    save(make(setup), folder, 0, {}, with_optimizer=False)


def train(setup: Setup, folder: Path, count: int = 2, backwards: bool = False) -> tuple:
    """Updates from the stored weights: metrics of each, gradient norms, whole gradients of the first update, whole
    weights after the last.
    """
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import accumulate_gradients, train_step

    state = make(setup)
    load(state, folder, with_optimizer=False)
    gradients = None
    if not setup.distributed:
        accumulate_gradients(state, share(state, rows(4)), forward_step, LENGTH)
        gradients = whole(state, {name: parameter.main_grad for name, parameter in state.named_parameters()})
    results = []
    for step in range(count):
        mine = share(state, rows(4, seed=step))
        results.append(train_step(state, mine[::-1] if backwards else mine, forward_step, LENGTH))
    state.gather_parameters()
    weights = whole(state, dict(state.named_parameters()))
    assert state.iteration == count
    assert all(result.update_successful for result in results)
    return [result.metrics for result in results], [result.grad_norm for result in results], gradients, weights


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradients.values()))


LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "dp2 overlap": (2, {"overlap": True}),
    "dp2 distributed": (2, {"distributed": True}),
    "dp2 distributed overlap": (2, {"distributed": True, "overlap": True}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 sp pp2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "pp2 dp2 distributed": (4, {"pp": 2, "distributed": True}),
    "tp2 dp2 sp distributed": (4, {"tp": 2, "sequence_parallel": True, "distributed": True}),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory):
    """The same training on one process, per kind of model: the stored start and what came of it."""
    known = {}

    def get(**kind: object) -> tuple[Path, tuple]:
        key = tuple(sorted(kind.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("start")
            pool(1).run(write_start, Setup(**kind), folder)
            known[key] = folder, pool(1).run(train, Setup(**kind), folder)[0]
        return known[key]

    return get


SGD = {"optimizer": "sgd", "clip": 0.0}
CASES = [(layout, {}) for layout in LAYOUTS] + [
    ("tp2 sp pp2", SGD),
    ("tp2 sp pp2", {"tied": True}),
    ("pp2 dp2 distributed", {"tied": True}),
]


@pytest.mark.parametrize(("layout", "kind"), CASES, ids=[" ".join([layout, *map(str, kind)]) for layout, kind in CASES])
def test_layout_changes_nothing(layout: str, kind: dict, one_process) -> None:
    world, where = LAYOUTS[layout]
    folder, (metrics, norms, gradients, weights) = one_process(**kind)
    for rank_metrics, rank_norms, rank_gradients, rank_weights in pool(world).run(
        train, Setup(**kind, **where), folder
    ):
        for one, other in zip(metrics, rank_metrics, strict=True):
            assert other == pytest.approx(one, rel=1e-5)
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        if rank_gradients is not None:
            assert rank_gradients.keys() == gradients.keys() or kind.get("tied")
            for name, value in gradients.items():
                assert (rank_gradients[name] - value).norm() <= 1e-5 * norm(gradients), name
        for name, value in weights.items():
            assert (rank_weights[name] - value).norm() <= 1e-5 * value.norm().clamp(min=1), name


def test_gradient_norm_is_that_of_the_gathered_gradients(one_process) -> None:
    _, (metrics, norms, gradients, _) = one_process()
    assert norms[0] == pytest.approx(norm(gradients), rel=1e-5)
    assert metrics[0]["tokens"] == 4 * (LENGTH - 1)
    assert metrics[0]["half"] == pytest.approx(metrics[0]["loss"] * 2 * (LENGTH - 1), rel=1e-6)


def test_order_of_rows_changes_nothing(one_process) -> None:
    folder, (metrics, norms, _, weights) = one_process()
    back = pool(1).run(train, Setup(), folder, 2, True)[0]
    assert back[1] == pytest.approx(norms, rel=1e-5)
    for name, value in weights.items():
        assert (back[3][name] - value).norm() <= 1e-5 * value.norm().clamp(min=1), name


def plain_gradient(folder: Path, setup: Setup) -> float:
    """Largest distance between the accumulated gradient and that of one plain sum under autograd."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import accumulate_gradients

    def in_own_precision(
        row: torch.Tensor, model: torch.nn.Module
    ):  # megatron-core's cross entropy computes in float32
        def loss(logits: torch.Tensor):
            return torch.nn.functional.cross_entropy(logits[0, :-1], row[0, :-1], reduction="sum") / (
                4 * (LENGTH - 1)
            ), {}

        return forward_step(row, model)[0], loss

    state = make(setup, with_optimizer=False)
    load(state, folder)
    metrics = accumulate_gradients(state, rows(4), in_own_precision, LENGTH)
    accumulated = {name: parameter.main_grad.clone() for name, parameter in state.named_parameters()}
    accumulate_gradients(state, rows(4), in_own_precision, LENGTH)  # a second time starts from zero
    for name, parameter in state.named_parameters():
        assert parameter.main_grad.dtype == (torch.float64 if setup.float64 else torch.float32)
        torch.testing.assert_close(parameter.main_grad, accumulated[name])
    total, mask = 0, torch.ones(LENGTH, LENGTH).tril().logical_not()[None, None]
    parameters = dict(state.named_parameters())
    for row in rows(4):
        logits = state.module(row, torch.arange(LENGTH)[None], mask)[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, row[0, :-1], reduction="sum") / (4 * (LENGTH - 1))
    assert metrics["loss"] == pytest.approx(float(total), rel=1e-5)
    expected = torch.autograd.grad(total, list(parameters.values()))
    return max(float((accumulated[name] - grad).norm()) for name, grad in zip(parameters, expected, strict=True))


@pytest.mark.parametrize(("setup", "tolerance"), [(Setup(), 1e-5), (Setup(float64=True), 1e-12)], ids=["fp32", "fp64"])
def test_gradient_is_that_of_the_plain_sum(setup: Setup, tolerance: float, tmp_path: Path) -> None:
    pool(1).run(write_start, setup, tmp_path)
    assert pool(1).run(plain_gradient, tmp_path, setup)[0] < tolerance


def gradients64(setup: Setup, folder: Path) -> dict[str, torch.Tensor]:
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import accumulate_gradients

    state = make(setup, with_optimizer=False)
    load(state, folder)
    accumulate_gradients(state, share(state, rows(4)), forward_step, LENGTH)
    return whole(state, {name: parameter.main_grad for name, parameter in state.named_parameters()})


@pytest.mark.parametrize("where", [{"tp": 2, "sequence_parallel": True}, {"pp": 2}, {}], ids=["tp2 sp", "pp2", "dp2"])
def test_float64_gradients_agree_between_layouts(where: dict, tmp_path: Path) -> None:
    pool(1).run(write_start, Setup(float64=True), tmp_path)
    one = pool(1).run(gradients64, Setup(float64=True), tmp_path)[0]
    other = pool(2).run(gradients64, Setup(float64=True, **where), tmp_path)[0]
    for name, value in one.items():
        assert (other[name] - value).norm() <= 1e-7 * norm(one), (
            name
        )  # megatron-core's cross entropy computes in float32


def learns_in_bf16(setup: Setup) -> tuple[float, float]:
    from megatron_dlm.training.step import train_step

    state = make(setup)
    losses = [train_step(state, share(state, rows(4)), forward_step, LENGTH).metrics["loss"] for _ in range(6)]
    for _, parameter in state.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.main_grad.dtype == torch.float32
        main = parameter.main_param
        if main is not None and not setup.distributed:
            torch.testing.assert_close(parameter.float(), main, rtol=1e-2, atol=1e-2)
            assert main.dtype == torch.float32
    return losses[0], losses[-1]


@pytest.mark.parametrize(("world", "distributed"), [(1, False), (2, True)])
def test_bf16_keeps_fp32_masters(world: int, distributed: bool) -> None:
    for first, last in pool(world).run(learns_in_bf16, Setup(bf16=True, distributed=distributed)):
        assert last < first - 0.1


def forward(setup: Setup, folder: Path, collect: str) -> tuple:
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import forward_only

    state = make(setup)
    load(state, folder, with_optimizer=False)

    def sums(row: torch.Tensor, model: torch.nn.Module):
        output, loss = forward_step(row, model)
        assert not output.requires_grad or not torch.is_grad_enabled()
        return output, lambda logits: (int(row[0, 0]), float(loss(logits)[0]))

    modes = [chunk.training for chunk in state.chunks]
    items = forward_only(state, rows(3), sums, LENGTH, collect=collect)
    assert [chunk.training for chunk in state.chunks] == modes
    return state.groups.is_pipeline_last, items


@pytest.mark.parametrize("collect", ["last_stage", "all"])
@pytest.mark.parametrize(("world", "where"), [(1, {}), (2, {"pp": 2}), (2, {"tp": 2}), (4, {"tp": 2, "pp": 2})])
def test_forward_only_collects_one_item_per_row(world: int, where: dict, collect: str, one_process) -> None:
    folder, _ = one_process()
    expected = pool(1).run(forward, Setup(), folder, "last_stage")[0][1]
    assert [first for first, _ in expected] == [int(row[0, 0]) for row in rows(3)]
    for last, items in pool(world).run(forward, Setup(**where), folder, collect):
        if last or collect == "all":
            assert [first for first, _ in items] == [first for first, _ in expected]
            assert [loss for _, loss in items] == pytest.approx([loss for _, loss in expected], rel=1e-5)
        else:
            assert items == []


def largest_values(setup: Setup) -> tuple[float, float, float]:
    """Of an update whose rows report their first token as a sum, as a maximum, and as a negative one."""
    from megatron_dlm.training.step import train_step

    def step(row: torch.Tensor, model: torch.nn.Module):
        output, loss = forward_step(row, model)
        first = row[0, 0].float()
        return output, lambda logits: (loss(logits)[0], {"a": first, "a_max": first, "b_max": -first})

    state = make(setup)
    metrics = train_step(state, share(state, rows(4)), step, LENGTH).metrics
    return metrics["a"], metrics["a_max"], metrics["b_max"]


@pytest.mark.parametrize(("world", "where"), [(1, {}), (2, {}), (2, {"tp": 2}), (4, {"pp": 2})])
def test_a_metric_that_ends_in_max_is_the_largest_of_all_rows(world: int, where: dict) -> None:
    first = [float(row[0, 0]) for row in rows(4)]
    assert len(set(first)) > 1
    assert pool(world).run(largest_values, Setup(**where)) == [(sum(first), max(first), -min(first))] * world


def misuse() -> None:
    from megatron_dlm.training.state import TrainState
    from megatron_dlm.training.step import accumulate_gradients, train_step

    state = make(Setup())

    def detached(row: torch.Tensor, model: torch.nn.Module):
        output, _ = forward_step(row, model)
        return output, lambda logits: (torch.zeros(()), {})

    def uneven(row: torch.Tensor, model: torch.nn.Module):
        output, _ = forward_step(row, model)
        return output, lambda logits: (logits.sum(), {f"m{int(row[0, 0])}": torch.zeros(())})

    with pytest.raises(ValueError, match="no graph behind it"):
        train_step(state, rows(1), detached, LENGTH)
    with pytest.raises(ValueError, match="different metrics"):
        train_step(state, rows(3), uneven, LENGTH)
    with pytest.raises(ValueError, match="at least one row"):
        train_step(state, [], forward_step, LENGTH)
    state.optimizer = None
    with pytest.raises(ValueError, match="no optimizer"):
        train_step(state, rows(1), forward_step, LENGTH)
    assert accumulate_gradients(state, rows(1), forward_step, LENGTH)["tokens"] == LENGTH - 1
    with pytest.raises(ValueError, match="already belongs"):
        from megatron_dlm.config.parallel import ParallelConfig

        TrainState.build(lambda *_: state.module, state.config, None, ParallelConfig(), state.groups, 1)


def test_misuse_is_refused() -> None:
    pool(1).run(misuse)


def without_targets(setup: Setup) -> tuple:
    """An update in which all rows but the first are padding: their loss is a zero that hangs on the graph."""
    from megatron_dlm.training.step import train_step

    state = make(setup)
    first = int(rows(4)[0][0, 0])

    def step(row: torch.Tensor, model: torch.nn.Module):
        output, loss = forward_step(row, model)
        if int(row[0, 0]) == first:
            return output, loss
        return output, lambda logits: ((logits * 0).sum(), {"tokens": torch.zeros(()), "half": torch.zeros(())})

    result = train_step(state, share(state, rows(4)), step, LENGTH)
    return result.metrics["tokens"], result.grad_norm > 0


@pytest.mark.parametrize(("world", "where"), [(1, {}), (2, {}), (2, {"pp": 2})])
def test_rows_without_targets(world: int, where: dict) -> None:
    assert pool(world).run(without_targets, Setup(**where)) == [(LENGTH - 1, True)] * world
    assert VOCABULARY == 64
