"""Adapters on their way to the engine, which reads merged weights and knows nothing of them."""

from __future__ import annotations

import pytest
import torch

from tests.harness import STAND_IN, pool
from tests.parallel.test_lora import PP2, SP, TE, TP2, forward_step, make_state, parts
from tests.tiny import model_config, vocabulary


def rollout_model(state, tp: int):
    """A plain model of all layers, on the meta device."""
    from megatron_dlm import platform
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import rollout_groups

    groups, model = rollout_groups(state.groups, tp, None), model_config(num_layers=4)
    config = transformer_config(
        model,
        ParallelConfig(tensor_model_parallel_size=tp),
        dtype=state.config.params_dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    with platform.cuda_calls_on_cpu(), torch.device("meta"):
        return BlockDiffusionModel(config, model_shape(model), groups.pg_collection).requires_grad_(False).eval()


def logprobs_of(model, rows) -> list[torch.Tensor]:
    from megatron_dlm.model.head import target_policy

    with torch.no_grad():
        return [
            target_policy(model, model.forward_row(row, True), row.targets.label, 0.7, vocabulary(), 8)[0]
            for row in rows
        ]


def trained_logprobs(state, rows, length: int) -> list[torch.Tensor]:
    from megatron_dlm.model.head import target_policy
    from megatron_dlm.training.step import forward_only

    def step(row, model):
        output = model.module.forward_row(row, headless=True)
        return output, lambda hidden: target_policy(model.module, hidden, row.targets.label, 0.7, vocabulary(), 8)[0]

    return forward_only(state, rows, step, length, collect="all")


def carried(parallel: dict, tp: int, float64: bool) -> dict:
    """Refit after changes of the adapters: by hand in float64, by updates in fp32."""
    from megatron_dlm.rollout.refit import Refit
    from megatron_dlm.training.state import adapters_by_weight
    from megatron_dlm.training.step import train_step

    state = make_state(parallel, torch.float64 if float64 else torch.float32, train=not float64)
    model = rollout_model(state, tp)
    refit = Refit(state, model, 3_000, verify=True)
    rows, length = parts(state)
    for _ in range(2):
        if float64:
            for _, adapter in sorted(adapters_by_weight(state).items()):
                place = torch.arange(adapter.b.numel()).view_as(adapter.b)
                adapter.b.data.add_(0.2 * torch.cos(1.3 * place))
        else:
            train_step(state, rows, forward_step, length)
        report = refit.run()
        found, expected = logprobs_of(model, rows), trained_logprobs(state, rows, length)
        error = max((one - other).abs().max().item() for one, other in zip(found, expected))
    adapters, given = adapters_by_weight(state), dict(model.named_parameters())
    trained = dict(state.named_parameters())
    alike = [name for name in trained if name in given and given[name].shape == trained[name].shape]
    return {
        "error": error,
        "adapted": [
            torch.equal(given[name], adapters[name].merged(trained[name])) for name in alike if name in adapters
        ],
        "changed": [not torch.equal(given[name], trained[name]) for name in alike if name in adapters],
        "shared": [given[name] is trained[name] for name in alike if name not in adapters],
        "report": report,
        "names": not any(".lora." in name for name in given),
        "bytes": sum(given[name].nbytes for name in adapters if name in given),
    }


CASES = {
    "tp2 sp to tp1": (2, SP, 1, False),
    "pp2 to tp2": (2, PP2, 2, False),
    "dp2 overlap": (
        2,
        dict(use_distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True),
        1,
        False,
    ),
    "tp2": (2, TP2, 2, True),
    "tp2 sp, Transformer Engine to tp1": (2, TE, 1, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_engine_computes_what_the_adapted_model_does(case: str) -> None:
    """And --verify-refit, which counts the two merged, agrees. In the layout of training the engine holds a merged copy
    of adapted weights, and shares the others."""
    world, parallel, tp, float64 = CASES[case]
    packages = [STAND_IN] if "Engine" in case else []
    for found in pool(world, *packages).run(carried, parallel, tp, float64):
        assert found["names"] and found["error"] < (1e-10 if float64 else 1e-5)
        assert all(found["adapted"]) and all(found["changed"])
        if case in ("dp2 overlap", "tp2"):
            assert len(found["adapted"]) == 16 and all(found["shared"]) and found["shared"]
            assert found["report"].moved == found["bytes"] and found["report"].received == 0
