"""FlexAttention in models that several processes share: losses and gradients are those of dense attention there, which
test_layouts.py holds against one process.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item
from tests.harness import pool
from tests.tiny import disturb, model_config, vocabulary

LAYOUTS = {
    "cp2": dict(context_parallel_size=2),
    "tp2 sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2 vpp2 recomputed": dict(
        pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2, recompute_granularity="selective"
    ),
}


def rows_of() -> list:
    from megatron_dlm.diffusion.layout import Grid
    from megatron_dlm.diffusion.rows import build_row

    rng, rows = np.random.default_rng(0), []
    for groups in ([(9, [14, 30, 7]), (4, [1, 22])], [(17, [30])]):
        traces = [trace for p, lengths in groups for trace in random_group(p, lengths, 4, rng, f"p{p}")]
        items = [trace_item(trace, Grid(4)) for trace in traces]
        rows.append(build_row(list(enumerate(items)), 448, MASK_ID, PAD_ID))
    return rows


def run(layout: dict) -> list[tuple]:
    """For each backend: how often attention was made, the metrics, and this rank's gradients."""
    from unittest import mock

    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.diffusion.context import Sharing
    from megatron_dlm.model import attention_backends
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.sft.objective import sft_forward
    from megatron_dlm.training.state import TrainState
    from megatron_dlm.training.step import accumulate_gradients

    parallel = ParallelConfig(**layout)
    groups, model = initialize(parallel, seed=1), model_config(num_layers=4)
    config = transformer_config(model, parallel, dtype=torch.float64)
    build = lambda *ends: BlockDiffusionModel(config, model_shape(model), groups.pg_collection, *ends)
    state = TrainState.build(build, config, None, parallel, groups, 1)
    for chunk in state.chunks:
        disturb(chunk.module, groups.tp_rank)
    sharing = Sharing(groups.cp_size, groups.cp_rank, 4, 16, PAD_ID)
    rows, found = [sharing.part(row)[0] for row in rows_of()], []
    for backend in ("flex", "dense"):
        kind, made = attention_backends.KINDS[backend], []
        count = lambda *given, kind=kind, made=made: made.append(1) or kind(*given)
        for chunk in state.chunks:
            chunk.module.attention_backend = backend
        with mock.patch.dict(attention_backends.KINDS, {backend: count}):
            forward = sft_forward(vocabulary(), len(rows), 512)
            metrics = accumulate_gradients(state, rows, forward, len(rows[0].tokens))
        gradients = {name: parameter.main_grad.clone() for name, parameter in state.named_parameters()}
        found.append((len(made), metrics, gradients))
        assert not any(row.made for row in rows)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_dense_attention(layout: str) -> None:
    for (made, metrics, gradients), (_, expected, dense) in pool(2).run(run, LAYOUTS[layout]):
        assert made == 2  # once for each row, whatever the number of virtual stages
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-12) and expected["loss"] > 0
        for name, gradient in gradients.items():
            assert (gradient - dense[name]).norm() <= 1e-11 * dense[name].norm(), name
