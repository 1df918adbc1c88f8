"""Bytes of fused layers and of FP8, written out for one small shape; and what a step in FP8 takes."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.lora import LoraConfig
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning.cost import step_cost
from megatron_dlm.planning.hardware import HARDWARE
from megatron_dlm.planning.head import head_bytes
from megatron_dlm.planning.job import Job
from megatron_dlm.planning.layout import Layout, supervised
from megatron_dlm.planning.memory import build, plan_memory
from megatron_dlm.planning.precision import Precision
from megatron_dlm.planning.search import estimate
from megatron_dlm.planning.world import place_of
from tests.planning.test_job import rl_job
from tests.planning.test_plan_against_run import TOKENS, a_job

TE = dict(transformer_impl="transformer_engine")
FP8 = TE | dict(fp8_format="hybrid")
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")

# Of a weight of 256 outputs and 384 inputs: a byte a number by rows and one by columns; and scales: one number of 4
# bytes; 4 bytes for each 128 x 128 of 2 x 3, in lines of 4; a byte for each 32, 12 in each of 256 lines, 8 in each of
# 384 columns.
WEIGHT = {
    "tensorwise": (2 * 98_304 + 4, 98_304 + 4),
    "delayed": (2 * 98_304 + 4, 98_304 + 4),
    "blockwise": (2 * 98_304 + 4 * (2 * 4 + 3 * 4), 98_304 + 4 * 2 * 4),
    "mxfp8": (2 * 98_304 + 256 * 12 + 8 * 384, 98_304 + 256 * 12),
}
# Of an input of 256 tokens and 384 channels: a byte a number by columns; 4 bytes for each 128 tokens of a channel; a
# byte for each 32 of them.
INPUT = {"tensorwise": 98_304 + 4, "delayed": 98_304 + 4, "blockwise": 98_304 + 4 * 2 * 384, "mxfp8": 98_304 + 8 * 384}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_of_a_matrix(recipe: str) -> None:
    precision = Precision(True, recipe)
    assert (precision.weight_bytes(256, 384), precision.weight_bytes(256, 384, backward=False)) == WEIGHT[recipe]
    assert precision.input_bytes(256, 384) == INPUT[recipe]
    blackwell = Precision(True, recipe, transposed=False).weight_bytes(256, 384)
    assert blackwell == (98_308 if recipe in ("tensorwise", "delayed") else WEIGHT[recipe][0])


def test_layers_at_the_ends_stay_in_bf16() -> None:
    ends = FP8 | dict(first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    found = Precision.of(ParallelConfig(**ends))
    assert [found.in_fp8(layer, 6) for layer in range(6)] == [False, False, True, True, True, False]
    assert found.share(6) == 0.5 and Precision.of(ParallelConfig(**FP8)).share(6) == 1
    assert Precision.of(ParallelConfig(**TE)) == Precision(fused=True) and Precision().share(6) == 0


def built(layers: int = 1, **layout):
    """One rank of a job of so many layers; 512 tokens, hidden 128, 8 heads and 4 for keys of 16, a unit of 384."""
    job = a_job(1, **layout)
    job = job.changed(model=dataclasses.replace(job.model, num_layers=layers))
    return build(job, place_of(0, 1, job.parallel), {})


# What a layer keeps of a token in bf16, besides the inputs of its products: two norms (input, one number), queries,
# keys and values as they were made, queries in the order of heads, a number for the norm of each head, queries and keys
# turned, attention's output and one number a head, both halves of the unit.
BESIDES = 2 * (2 * 128 + 4) + 2 * (256 + 128) + 4 * (8 + 4) + 2 * (128 + 64) + 2 * 128 + 4 * 8 + 2 * 768
# Inputs of the products: queries, keys and values; both of the unit. That of the projection is attention's output.
WIDTHS = (128, 128, 384)


def kept(recipe: str | None) -> int:
    if recipe is None:
        return TOKENS * (BESIDES + sum(2 * width for width in WIDTHS))
    scales = {
        "tensorwise": lambda width: 4,
        "delayed": lambda width: 4,
        "blockwise": lambda width: 4 * 4 * width,  # 4 blocks of 128 tokens
        "mxfp8": lambda width: 16 * width,
    }[recipe]
    read = (*WIDTHS, 128) if recipe == "delayed" else WIDTHS  # which keeps that of the projection in FP8, too
    return TOKENS * BESIDES + sum(TOKENS * width + scales(width) for width in read)


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_layer_keeps_what_its_parts_do(recipe: str | None) -> None:
    settings = TE if recipe is None else FP8 | dict(fp8_recipe=recipe)
    one, two = built(1, **settings), built(2, **settings)
    saved = [sum(rank.activations["policy"].saved) for rank in (one, two)]
    assert saved[1] - saved[0] == kept(recipe)


def test_copies_stand_beside_weights_or_in_their_place() -> None:
    matrices = [(256, 128), (128, 128), (768, 128), (128, 384)]
    numbers = sum(outputs * inputs for outputs, inputs in matrices)
    plain, beside = built(2).models["policy"], built(2, **FP8).models["policy"]
    assert (plain.copies, beside.copies) == (0, 2 * (2 * numbers + 4 * 4))
    assert dataclasses.replace(beside, copies=0) == plain
    one = built(3, **FP8, first_last_layers_bf16=True).models["policy"]
    assert one.copies == 2 * numbers + 4 * 4
    # FP8 alone: its two bytes a number take as much as bf16 did, with the scales; masters and gradients are the same.
    gather = FP8 | dict(fp8_param_gather=True, use_distributed_optimizer=True)
    alone, bf16 = built(2, **gather).models["policy"], built(2, use_distributed_optimizer=True).models["policy"]
    assert alone == dataclasses.replace(bf16, parameters=bf16.parameters + 2 * 4 * 4)


def test_copies_are_there_while_a_model_learns() -> None:
    job = a_job(1, **FP8)
    (rank,) = plan_memory(job, 2**34)
    assert rank.phases["train"]["policy weights in FP8"] == rank.built.models["policy"].copies > 0


def test_the_head_works_in_place_with_kernels() -> None:
    """A tile of logits in bf16, with one in fp32 beside it where there are none; gradients of hidden states, weight."""
    job = a_job(1, loss_chunk_size=64)
    targets, width = job.row.targets, 1024  # 1000, filled up to 128s
    ours, plain = head_bytes(job, True), head_bytes(job, False)
    tile = targets * (64 * width // targets // 64 * 64)  # as many logits as 64 targets have, in runs of 64 tokens
    gradients = targets * 128 * 4 + width * 128 * 2
    product = targets * 128 * 2  # of a tile and the weight, which is added to the gradient
    assert ours == pytest.approx(gradients + 2 * tile + product, rel=0.02)
    assert plain == pytest.approx(gradients + 6 * tile, rel=0.02)
    # A frozen table has no gradient; it is a tile and the hidden states' gradient that are left.
    frozen = head_bytes(job.changed(lora=LoraConfig(lora_rank=4)), True)
    assert frozen == pytest.approx(targets * 128 * 4 + 2 * tile + product, rel=0.02)
    assert job.triton_head and not job.changed(parallel=ParallelConfig(loss_head="torch")).triton_head


MODEL = resolve(ModelConfig(model_preset="sdar-8b", bf16=True), None)
WORK = supervised(64, 256, (1000,), row_budget=8192)
H200 = HARDWARE["h200"]


def train(precision: Precision, **layout):
    return step_cost(MODEL, Layout(precision=precision, **layout), WORK, H200).phases["train"]


def test_products_of_layers_alone_are_faster_in_fp8() -> None:
    bf16, fp8 = train(Precision(True)), train(Precision(True, "tensorwise"))
    assert fp8.flops == bf16.flops and fp8.parts["attention"] == bf16.parts["attention"]
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128  # the latter are norms
    rows = bf16.facts["rows"] * bf16.facts["row_tokens"]
    body = 3 * 2 * 36 * layer * rows  # forward, and twice that backward
    peaks = H200.bf16_flops * H200.matmul_fraction, H200.fp8_flops * H200.fp8_fraction
    assert bf16.parts["products"] - fp8.parts["products"] == pytest.approx(body / peaks[0] - body / peaks[1], rel=1e-6)
    ends = train(Precision(True, "tensorwise", start=1, end=1))
    gain = (bf16.parts["products"] - ends.parts["products"]) / (bf16.parts["products"] - fp8.parts["products"])
    assert gain == pytest.approx(34 / 36)
    # Rounding is traffic: in each layer 6 bytes a number, of inputs (the heads' and the unit's, too) and of gradients.
    read, made = 2 * 4096 + 4096 + 12288, 2 * 4096 + 6144 + 2 * 12288
    numbers = read + made
    moved = 36 * rows * 6 * numbers / (H200.memory_bandwidth * H200.bandwidth_fraction)
    assert fp8.parts["memory"] - bf16.parts["memory"] == pytest.approx(moved, rel=1e-6)


def test_weights_in_fp8_are_gathered_as_bytes() -> None:
    layout = dict(world=8, tp=2, sequence_parallel=True)
    bf16, fp8 = train(Precision(True, "tensorwise"), **layout), train(Precision(True, "tensorwise", True), **layout)
    layers = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288) / 2  # of a rank
    less = bf16.sent["data", "node"] - fp8.sent["data", "node"]
    assert less == pytest.approx(layers * 3 / 4, rel=1e-3)  # each of 4 ranks gathers 3 quarters, in a byte less


@pytest.mark.parametrize(
    "settings", [TE, FP8 | dict(pipeline_model_parallel_size=2), FP8 | dict(tensor_model_parallel_size=2)]
)
def test_the_formula_is_close_to_what_is_built(settings: dict) -> None:
    """Which sorts out candidates (planning/search.py)."""
    job = rl_job(**settings, sequence_parallel="tensor_model_parallel_size" in settings)
    job = job.changed(model=dataclasses.replace(job.model, num_layers=6))
    found = plan_memory(job.changed(rollout=None, rl=None), 2**40)
    assert estimate(job) == pytest.approx(max(rank.totals["train"] for rank in found), rel=0.08)


def test_rows_of_a_recipe_are_whole_blocks_on_every_rank() -> None:
    for layout in (Layout(world=8, tp=4, sequence_parallel=True), Layout(world=8, tp=2, cp=2, sequence_parallel=True)):
        rows = step_cost(MODEL, dataclasses.replace(layout, precision=Precision(True, "blockwise")), WORK, H200).phases[
            "train"
        ]
        assert rows.facts["row_tokens"] % (128 * layout.tp) == 0


def test_an_older_gpu_has_no_fp8() -> None:
    from megatron_dlm.config.errors import ConfigError

    with pytest.raises(ConfigError, match="no products in FP8"):
        step_cost(MODEL, Layout(precision=Precision(True, "tensorwise")), WORK, HARDWARE["a100"])


def test_kernels_are_for_jobs_with_a_chunked_head() -> None:
    job: Job = a_job(1, loss_chunk_size=0)
    assert not job.triton_head
