from __future__ import annotations

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.optimizer import OptimizerConfig
from tests.harness import pool
from tests.small_model import LENGTH, Setup, forward_step, gpt, make, rows, share, transformer_config
from tests.tiny import make_state as tiny_state


def names(setup: Setup) -> list[tuple[str, tuple[int, ...]]]:
    state = make(setup)
    return [(name, tuple(parameter.shape)) for name, parameter in state.named_parameters()]


@pytest.mark.parametrize("experts", [None, 4])
def test_names_are_those_of_the_whole_model(experts: int | None) -> None:
    whole = pool(1).run(names, Setup(experts=experts))[0]
    stages = pool(2).run(names, Setup(pp=2, experts=experts))
    assert sorted(stages[0] + stages[1]) == sorted(whole)
    assert not set(stages[0]) & set(stages[1])


def rates() -> list[float]:
    from megatron_dlm.training.step import train_step

    state = make(Setup(), train_iters=5)
    seen = [state.learning_rate()]
    for _ in range(5):
        train_step(state, rows(1), forward_step, LENGTH)
        seen.append(state.learning_rate())
    return seen


def test_learning_rate_warms_up_and_decays_linearly() -> None:
    assert pool(1).run(rates)[0] == pytest.approx([0.0, 0.01, 0.00775, 0.0055, 0.00325, 0.001])


def too_long_a_warmup() -> None:
    make(Setup(), train_iters=1)


def test_warmup_longer_than_the_run() -> None:
    with pytest.raises(AssertionError, match="lr-warmup-iters 1 leaves nothing of"):
        pool(1).run(too_long_a_warmup)


def sgd_distributed() -> str:
    with pytest.raises(ConfigError) as error:
        make(Setup(optimizer="sgd", distributed=True))
    return str(error.value)


def test_distributed_optimizer_is_adam() -> None:
    assert "works with --optimizer adam only, not sgd" in pool(1).run(sgd_distributed)[0]


def test_a_rank_without_parameters_of_an_optimizer_has_nothing_to_forget() -> None:
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from megatron_dlm.training.state import forget_optimizer

    state = tiny_state(torch.float32, optimizer=OptimizerConfig(lr=1e-2))
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    with platform.cuda_calls_on_cpu():
        stub = FP32Optimizer(None, parts[0].config, lambda *unused: None)
    state.optimizer = ChainedOptimizer([*parts, stub])
    for _, parameter in state.named_parameters():
        parameter.main_grad.fill_(0.1)
    with platform.cuda_calls_on_cpu():
        assert parts[0].step()[0]
    moments = [kept["exp_avg"] for kept in parts[0].optimizer.state.values()]
    assert moments and all(moment.all() for moment in moments)
    forget_optimizer(state)
    assert not any(moment.any() for moment in moments)


def two_models() -> tuple[float, float, bool]:
    """A trained policy beside a frozen reference, each with a config of its own."""
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.training.state import TrainState
    from megatron_dlm.training.step import forward_only, train_step

    policy = make(Setup())
    config = transformer_config(Setup())

    def frozen(pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        return gpt(Setup(), config, policy.groups, pre_process, post_process, vp_stage).requires_grad_(False)

    reference = TrainState.build(frozen, config, None, ParallelConfig(), policy.groups, 1)
    before = {name: value.clone() for name, value in reference.named_parameters()}

    def loss_of(row: torch.Tensor, model: torch.nn.Module):
        output, loss = forward_step(row, model)
        return output, lambda logits: float(loss(logits)[0])

    first = forward_only(reference, rows(1), loss_of, LENGTH)[0]
    train_step(policy, rows(2), forward_step, LENGTH)
    second = forward_only(reference, rows(1), loss_of, LENGTH)[0]
    assert not reference.chunks[0].buffers  # no gradients are kept for it
    return first, second, all(torch.equal(value, before[name]) for name, value in reference.named_parameters())


def test_a_frozen_model_beside_a_trained_one() -> None:
    first, second, unchanged = pool(1).run(two_models)[0]
    assert first == second
    assert unchanged


def experts(setup: Setup, folder) -> tuple:
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import train_step

    state = make(setup)
    load(state, folder, with_optimizer=False)
    results = [train_step(state, share(state, rows(4, seed=n)), forward_step, LENGTH) for n in range(2)]
    return [r.metrics["loss"] for r in results], [r.grad_norm for r in results]


def write_experts(folder) -> None:
    from megatron_dlm.checkpoint.distributed import save

    save(make(Setup(experts=4)), folder, 0, {}, with_optimizer=False)


@pytest.mark.parametrize(
    ("world", "where"),
    [
        (2, {"ep": 2}),
        (2, {"ep": 2, "distributed": True}),
        (2, {"pp": 2}),
        (4, {"ep": 2, "tp": 2, "sequence_parallel": True}),
    ],
    ids=["ep2", "ep2 distributed", "pp2", "ep2 dp2 tp2 sp"],
)
def test_mixture_of_experts_in_every_layout(world: int, where: dict, tmp_path) -> None:
    pool(1).run(write_experts, tmp_path)
    losses, norms = pool(1).run(experts, Setup(experts=4), tmp_path)[0]
    for rank_losses, rank_norms in pool(world).run(experts, Setup(experts=4, **where), tmp_path):
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        assert rank_norms == pytest.approx(norms, rel=1e-5)


def auxiliary_gradients(setup: Setup, folder, repeat: int) -> dict[str, float]:
    """Norms of the routers' gradients from the auxiliary loss alone."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.training.step import accumulate_gradients

    def no_loss(row: torch.Tensor, model: torch.nn.Module):
        return forward_step(row, model)[0], lambda logits: (logits.sum() * 0, {})

    state = make(setup, with_optimizer=False)
    load(state, folder)
    accumulate_gradients(state, share(state, rows(2) * repeat), no_loss, LENGTH)
    return {name: float(parameter.main_grad.norm()) for name, parameter in state.named_parameters() if "router" in name}


@pytest.mark.parametrize(("world", "where", "repeat"), [(1, {}, 3), (2, {"ep": 2}, 1), (2, {"ep": 2}, 3)])
def test_router_losses_are_a_mean_over_rows(world: int, where: dict, repeat: int, tmp_path) -> None:
    pool(1).run(write_experts, tmp_path)
    plain = pool(1).run(auxiliary_gradients, Setup(experts=4, auxiliary=0.1), tmp_path, 1)[0]
    assert min(plain.values()) > 1e-6
    assert pool(world).run(auxiliary_gradients, Setup(experts=4, auxiliary=0.1, **where), tmp_path, repeat)[
        0
    ] == pytest.approx(plain, rel=1e-4)
