"""Tokens, targets and pairs against rows that are built; FLOPs against what torch counts in a model that runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.layout import Grid, visible
from megatron_dlm.diffusion.rows import Row, build_row
from megatron_dlm.diffusion.views import split_views
from megatron_dlm.model.shape import resolve
from megatron_dlm.model.size import model_size
from megatron_dlm.planning import work
from megatron_dlm.planning.layout import Workload
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_trace, trace_item
from tests.tiny import make_model, model_config


def regular_item(prompt: int, response: int, block: int, steps: int, sample: int = 0, prompt_ids=None):
    """A response of which every block took `steps` denoising steps, and its last one is full."""
    assert (prompt + response) % block == 0
    rng = np.random.default_rng(7)
    trace = random_trace(prompt, response, block, rng, prompt_ids=prompt_ids, sample=sample)
    blocks = (np.arange(response) + prompt) // block
    place = np.array([np.flatnonzero(blocks[:n] == blocks[n]).size for n in range(response)])
    # Tokens of a block take turns; the number of a step goes on over blocks.
    numbers = (blocks - blocks[0]) * steps + place % steps + 1
    return trace_item(dataclasses.replace(trace, steps=numbers), Grid(block))


def built(items, budget: int) -> Row:
    length = items[0].shared_length + sum(item.own_length for item in items)
    assert length <= budget
    return build_row(list(enumerate(items)), length, MASK_ID, PAD_ID)


def counted(row: Row) -> tuple[int, int, int, int]:
    """Tokens, clean ones, targets and pairs of a row, by its dense mask."""
    clean = int((row.layout.view == 0).sum())
    return len(row.tokens), clean, len(row.targets.slot), int(visible(row.layout, row.layout).sum())


@pytest.mark.parametrize("block, steps", [(4, 1), (4, 2), (8, 3), (1, 1)])
@pytest.mark.parametrize("remainder", [0, 1, 2])
def test_a_response_is_as_large_as_its_row(block: int, steps: int, remainder: int) -> None:
    prompt = 2 * block + remainder % block
    response = 5 * block - remainder % block
    workload = Workload(block_size=block, steps_per_block=steps, row_budget=10_000)
    (part,) = work.parts_of(prompt, response, workload)
    item = regular_item(prompt, response, block, steps)
    found = (part.shared + part.own, part.shared + part.clean, part.targets, part.shared_area + part.own_area)
    assert found == pytest.approx(counted(built([item], 10_000)))


@pytest.mark.parametrize("budget", [110, 160, 250])
def test_parts_are_those_of_the_trainer(budget: int) -> None:
    """A response that exceeds a row is cut where the trainer cuts it, to a block."""
    workload = Workload(block_size=4, steps_per_block=2, row_budget=budget)
    parts = work.parts_of(10, 82, workload)
    cut = split_views(regular_item(10, 82, 4, 2), budget)
    assert len(parts) == len(cut) > 1
    total = 0
    for part, item in zip(parts, cut):
        tokens, clean, _, area = counted(built([item], budget))
        total += area
        assert part.shared + part.own <= budget
        # The trainer may cut between two copies of one block.
        assert abs(part.shared + part.own - tokens) <= 8 and abs(part.shared + part.clean - clean) <= 4
    assert sum(part.shared_area + part.own_area for part in parts) == pytest.approx(total, rel=0.05)
    assert sum(part.targets for part in parts) == pytest.approx(82)


def test_a_row_that_holds_no_response_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 80 tokens do not hold a response of 82 tokens"):
        work.parts_of(10, 82, Workload(row_budget=80))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_an_update_are_the_planner_s(ranks: int) -> None:
    """Equal responses to eight prompts: all of their tokens, pairs and targets are in the rows, and no more."""
    workload = Workload(prompts=8, samples=1, prompt_length=12, responses=(20,), steps_per_block=2, row_budget=300)
    rows = work.rows_of_update(workload, ranks)
    of_a_row = 8 // ranks // rows.rows
    item = regular_item(12, 20, 4, 2)
    items = [dataclasses.replace(item, group=f"p{n}") for n in range(of_a_row)]
    row = build_row(list(enumerate(items)), 68 * of_a_row, MASK_ID, PAD_ID)
    tokens, clean, targets, area = counted(row)
    assert (rows.filled, rows.clean, rows.targets, rows.area) == (tokens, clean, targets, area)
    assert rows.tokens == -(-tokens // 64) * 64 and rows.mean_area == area


def test_a_prompt_is_stored_once_for_its_responses() -> None:
    alone = Workload(prompts=8, samples=1, prompt_length=40, responses=(20,), row_budget=2000)
    rows = work.rows_of_update(alone, 1)
    shared = work.rows_of_update(dataclasses.replace(alone, prompts=1, samples=8), 1)
    assert rows.rows == shared.rows == 1
    assert rows.filled - shared.filled == 7 * 40 and rows.targets == shared.targets == 8 * 20


def test_dense_attention_computes_squares_of_groups() -> None:
    workload = Workload(prompts=2, samples=2, prompt_length=12, responses=(20,), row_budget=1000, attention="dense")
    rows = work.rows_of_update(workload, 1)
    group = 12 + 2 * ((5 - 1) * 4 + 2 * 5 * 4)
    assert rows.rows == 1 and rows.area == 2 * group**2


def test_what_exceeds_the_ranks_is_scaled() -> None:
    """Many ranks are planned as fewer with as much for each."""
    workload = Workload(prompts=512, samples=2, prompt_length=32, responses=(64, 128), row_budget=1024)
    few = work.rows_of_update(dataclasses.replace(workload, prompts=128), 64)
    many = work.rows_of_update(workload, 256)
    assert many.rows == few.rows and many.mean_area == pytest.approx(few.mean_area, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------- FLOPs
MODELS = {
    "dense": dict(hidden_size=64, ffn_hidden_size=160, kv_channels=16),
    "tied": dict(hidden_size=64, kv_channels=16, untie_embeddings_and_output_weights=False),
    "biases": dict(hidden_size=64, kv_channels=16, add_qkv_bias=True),
}


def run_and_count(row: Row, changes: dict, backward: bool) -> dict[str, int]:
    """FLOPs by operation, of a model that runs over the row."""
    model = make_model(torch.float32, **changes)
    for parameter in model.parameters():
        parameter.main_grad = None
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model.forward_row(row)
        if backward:
            logits.square().sum().backward()
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


def expected(config: ModelConfig, row: Row, backward: bool) -> tuple[float, float]:
    """Of the products, and of attention as our dense backend does it: whole squares of a row of one group."""
    tokens = len(row.tokens)
    factor = 1 + work.BACKWARD * backward
    products = (work.body_flops(config, tokens) + work.head_flops(config, len(row.targets.slot))) * factor
    return products, work.attention_flops(config, tokens**2) * (1 + work.ATTENTION_BACKWARD * backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name: str, backward: bool) -> None:
    prompt_ids = np.arange(16)
    row = built([regular_item(16, 28, 4, 2, sample, prompt_ids) for sample in range(2)], 1000)
    counts = run_and_count(row, MODELS[name], backward)
    attention = sum(count for operation, count in counts.items() if "attention" in operation)
    products, pairs = expected(model_config(**MODELS[name]), row, backward)
    assert sum(counts.values()) - attention == pytest.approx(products, rel=0.02)
    if attention:  # releases of torch differ in whether they count it on a CPU
        assert attention == pytest.approx(pairs, rel=0.02)
    assert products > 0


def test_flops_of_experts_are_those_of_the_chosen_ones() -> None:
    changes = dict(hidden_size=64, kv_channels=16, num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=96)
    row = built([regular_item(16, 28, 4, 2)], 1000)
    counts = run_and_count(row, changes, True)
    attention = sum(count for operation, count in counts.items() if "attention" in operation)
    products, _ = expected(model_config(**changes), row, True)
    assert sum(counts.values()) - attention == pytest.approx(products, rel=0.03)


@pytest.mark.parametrize("preset", ["sdar-8b", "sdar-30b-a3b"])
def test_sizes_add_up(preset: str) -> None:
    config = resolve(ModelConfig(model_preset=preset), None)
    sizes, size = work.sizes_of(config), model_size(config)
    assert sizes.total == size.total
    assert sizes.active + sizes.embedding + sizes.head == size.active
    if config.num_experts:
        assert sizes.experts == 48 * 128 * 3 * 2048 * 768


def test_full_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="not for full attention"):
        work.check_blocks(resolve(ModelConfig(model_preset="llada-8b"), None))
