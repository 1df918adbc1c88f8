"""Context parallelism in the model: logits of rows that several ranks share, and what these send each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, trace_item
from tests.diffusion.test_context import causal_item
from tests.harness import pool
from tests.tiny import disturb, model_config

LAYERS, HEADS, WIDTH = 3, 2, 8  # of keys and values


def rows_of(grid):
    """Packed rows: prompts shared by a group's responses, ragged traces, and a row that nobody has anything of."""
    from megatron_dlm.diffusion.rows import build_row

    rng, rows = np.random.default_rng(0), []
    for groups in ([(9, [14, 3, 7]), (4, [1, 22])], [(17, [30])], []):
        traces = [trace for p, lengths in groups for trace in random_group(p, lengths, grid.block_size, rng, f"p{p}")]
        items = [trace_item(trace, grid) for trace in traces]
        items += [causal_item(trace, f"causal {n}") for n, trace in enumerate(traces[:1])]
        rows.append(build_row(list(enumerate(items)), 384, MASK_ID, PAD_ID))
    return rows


def run(ranks: int, block: int, logit_shift: int) -> list[tuple]:
    """For each row: which of its targets are here, their logits, the bytes that this rank gave to the forward and to
    the backward exchange in each layer, and the clean tokens of the row's ranks."""
    from megatron.core.tensor_parallel import mappings

    from megatron_dlm import platform
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.diffusion.context import Sharing
    from megatron_dlm.diffusion.layout import CLEAN, Grid
    from megatron_dlm.model.block_diffusion import BlockDiffusionModel
    from megatron_dlm.model.shape import model_shape, transformer_config
    from megatron_dlm.parallel.groups import initialize

    parallel = ParallelConfig(context_parallel_size=ranks)
    groups, config = initialize(parallel, seed=1), model_config(block, num_layers=LAYERS, logit_shift=logit_shift)
    megatron = transformer_config(config, parallel, dtype=torch.float64)
    with platform.cuda_calls_on_cpu():
        model = disturb(BlockDiffusionModel(megatron, model_shape(config), groups.pg_collection), 0)
    sharing, found = Sharing(groups.cp_size, groups.cp_rank, block, 16, PAD_ID, logit_shift), []
    for whole in rows_of(Grid(block)):
        row, kept = sharing.part(whole)
        with CountedBytes(mappings) as counted:
            logits = model.forward_row(row)
            forward = list(counted.sent)
            logits.sum().backward()
        kept = torch.arange(len(whole.targets.slot)) if kept is None else kept
        clean = int(((row.layout.view == CLEAN) & (row.layout.group >= 0)).sum())
        width = None if row.context is None else row.context.width
        found.append((kept, logits.detach(), forward, counted.sent[len(forward) :], (clean, width)))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradient in gradients.values():
        torch.distributed.all_reduce(gradient, group=groups.cp)
    return [found, gradients]


class CountedBytes:
    """Bytes that megatron-core's gathers and scatters take from this rank, one number per call."""

    def __init__(self, mappings) -> None:
        self.mappings, self.sent = mappings, []

    def __enter__(self) -> CountedBytes:
        self.real = self.mappings.dist_all_gather_func, self.mappings.dist_reduce_scatter_func
        self.mappings.dist_all_gather_func = self._counting(self.real[0])
        self.mappings.dist_reduce_scatter_func = self._counting(self.real[1])
        return self

    def __exit__(self, *_: object) -> None:
        self.mappings.dist_all_gather_func, self.mappings.dist_reduce_scatter_func = self.real

    def _counting(self, function):
        def call(output, given, *args, **options):
            self.sent.append(given.numel() * given.element_size())
            return function(output, given, *args, **options)

        return call


@pytest.fixture(scope="module")
def alone() -> dict:
    return {key: pool(1).run(run, 1, *key)[0] for key in ((4, 0), (8, 0), (4, 1))}


@pytest.mark.parametrize("block, logit_shift", [(4, 0), (8, 0), (4, 1)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_logits_and_gradients_are_those_of_whole_rows(alone, ranks: int, block: int, logit_shift: int) -> None:
    results = pool(ranks).run(run, ranks, block, logit_shift)
    expected, gradients = alone[block, logit_shift]
    for number, (_, logits, *_) in enumerate(expected):
        seen = []
        for found, _ in results:
            kept, mine, *_ = found[number]
            seen += kept.tolist()
            torch.testing.assert_close(mine, logits[kept], rtol=1e-10, atol=1e-10)
        assert sorted(seen) == list(range(len(logits)))
    for name, gradient in gradients.items():
        for _, found in results:
            assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_keys_and_values_of_the_clean_text_are_exchanged_and_nothing_else(ranks: int) -> None:
    results = pool(ranks).run(run, ranks, 4, 0)
    per_token = 2 * HEADS * WIDTH * 8  # key and value in float64
    for number in range(3):
        rows = [found[number] for found, _ in results]
        most = max(clean for *_, (clean, _) in rows)
        for _, _, forward, backward, (clean, width) in rows:
            assert width == most
            if not most:  # nobody has anything
                assert forward == backward == []
                continue
            assert forward == [most * per_token] * LAYERS
            assert backward == [ranks * most * per_token] * LAYERS  # gradients of all ranks' text go back
