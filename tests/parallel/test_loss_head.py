"""The loss in chunks against the loss of the whole table, in layouts that share or move the head."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.harness import pool
from tests.parallel.jobs import Job, make_state
from tests.parallel.test_equivalence import rl_rows, sft_rows
from tests.tiny import vocabulary

CHUNKS = (1, 5, 1000)


def differences(parallel: dict, tied: bool) -> list[tuple[float, float, float]]:
    """For each chunk size: the loss by table and by chunks, and how far apart this rank's gradients are, relative to
    their norm; of an SFT update and of a TraceRL update with entropy bonus.
    """

    from megatron_dlm.rl.update import policy_forward
    from megatron_dlm.sft.objective import sft_forward
    from megatron_dlm.training.step import accumulate_gradients

    sizes = dict(untie_embeddings_and_output_weights=not tied)
    state = make_state(Job.of("sft", parallel, sizes, float64=True), False)
    settings = rl_settings()

    def forward_of(stage: str, chunk: int):
        if stage == "sft":
            return sft_forward(vocabulary(), 50, chunk)
        return policy_forward(vocabulary(), dataclasses.replace(settings, loss_chunk_size=chunk))

    found = []
    for stage, make_rows in (("sft", sft_rows), ("tracerl", rl_rows)):
        rows, _, length = make_rows(state)

        def update(chunk: int, stage: str = stage, rows: list = rows, length: int = length):
            metrics = accumulate_gradients(state, rows, forward_of(stage, chunk), length)
            return metrics, torch.cat([parameter.main_grad.flatten() for _, parameter in state.named_parameters()])

        table, by_table = update(0)
        for chunk in CHUNKS:
            metrics, by_chunks = update(chunk)
            assert metrics == pytest.approx(table, rel=1e-10, abs=1e-12)
            found.append((table["loss"], metrics["loss"], ((by_chunks - by_table).norm() / by_table.norm()).item()))
    return found


def rl_settings():
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.rl.methods import replay
    from megatron_dlm.rl.objective import PolicyObjective
    from megatron_dlm.rl.update import UpdateSettings

    return UpdateSettings(
        objective=PolicyObjective(0.2, 0.3, 0.1),
        temperature=0.8,
        states=replay(Grid(4)),
        aggregation="constant",
        longest=12,
        num_updates=1,
        max_tokens_per_row=96,
        entropy_coef=0.3,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
@pytest.mark.parametrize(
    "parallel",
    [
        dict(tensor_model_parallel_size=2),
        dict(tensor_model_parallel_size=2, sequence_parallel=True),
        dict(pipeline_model_parallel_size=2),
    ],
    ids=["tp2", "tp2 sp", "pp2"],
)
def test_loss_and_gradients_are_those_of_the_table(parallel: dict, tied: bool) -> None:
    for results in pool(2).run(differences, parallel, tied):
        assert len(results) == 2 * len(CHUNKS)
        for by_table, by_chunks, difference in results:
            assert by_chunks == pytest.approx(by_table, rel=1e-11) and abs(by_table) > 1e-3
            assert difference < 1e-11


def losses_with_small_buckets(overlap: bool, chunk: int, tied: bool) -> list[float]:
    """Of three updates whose parameters are gathered in many pieces, the head's weight in one of its own."""
    from unittest import mock

    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.sft.objective import sft_forward
    from megatron_dlm.training import state as training_state
    from megatron_dlm.training.step import train_step
    from tests.tiny import model_config

    parallel = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    groups = initialize(parallel, seed=1)
    model = model_config(untie_embeddings_and_output_weights=not tied)
    config = transformer_config(model, parallel, dtype=torch.float32)
    build = lambda *ends: BlockDiffusionModel(config, model_shape(model), groups.pg_collection, *ends)
    wrapper = training_state.DistributedDataParallelConfig
    with mock.patch.object(
        training_state, "DistributedDataParallelConfig", lambda **options: wrapper(**options, bucket_size=1500)
    ):
        state = training_state.TrainState.build(
            build, config, OptimizerConfig(lr=1e-2, adam_eps=1e-3), parallel, groups, 10
        )
    (ddp,) = state.chunks
    assert not overlap or len({id(group) for group in ddp.param_to_bucket_group.values()}) > 4
    rows, _, length = sft_rows(state)
    return [train_step(state, rows, sft_forward(vocabulary(), 50, chunk), length).metrics["loss"] for _ in range(3)]


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_the_head_waits_for_weights_that_are_gathered_meanwhile(tied: bool, chunk: int) -> None:
    apart, together = (pool(2).run(losses_with_small_buckets, overlap, chunk, tied) for overlap in (False, True))
    assert together[0] == pytest.approx(apart[0], rel=1e-5) and together[0] == together[1]
    assert apart[0][2] < 0.9 * apart[0][0]
