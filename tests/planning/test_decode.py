"""The roofline of a pass against benchmarks/roofline.py, and the queue of engines against times that are counted by
hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import roofline
from benchmarks.plain_loop import Shape
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning.cost import refit_cost
from megatron_dlm.planning.decode import (
    cache_bytes,
    cost_of_a_pass,
    experts_touched,
    prefill,
    rollout_cost,
    room_for,
)
from megatron_dlm.planning.hardware import HARDWARE
from megatron_dlm.planning.layout import Layout, Workload

MODEL = resolve(ModelConfig(model_preset="sdar-8b"), None)
MOE = resolve(ModelConfig(model_preset="sdar-30b-a3b"), None)
IDEAL = dataclasses.replace(
    HARDWARE["h200"], matmul_fraction=1, attention_fraction=1, bandwidth_fraction=1, layer_seconds=0, pass_seconds=0
)


def shape(model: ModelConfig) -> Shape:
    fields = {field.name for field in dataclasses.fields(Shape)}
    known = dict(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        heads=model.num_attention_heads, kv_heads=model.num_query_groups, head_dim=model.kv_channels,
        vocab_size=model.vocab_size,
    )  # fmt: skip
    rest = dict.fromkeys(fields - known.keys())
    return Shape(**known, **rest)


@pytest.mark.parametrize("running, context", [(1, 500), (8, 2000)])
def test_few_responses_wait_for_the_weights(running: int, context: int) -> None:
    tally = cost_of_a_pass(MODEL, Layout(), Workload(), IDEAL, running, context)
    theirs = roofline.seconds_of_a_pass(shape(MODEL), 2, roofline.HARDWARE["H200"], running, context, 4)
    logits = running * 4 * MODEL.vocab_size * 4 / IDEAL.memory_bandwidth
    assert tally.parts["weights"] + tally.parts["keys and values"] == pytest.approx(theirs - logits, rel=1e-3)


def test_many_responses_wait_for_products() -> None:
    """Tokens of 256 responses: a block each, and one more in every second pass; the head at masked positions."""
    tally = cost_of_a_pass(MODEL, Layout(), Workload(steps_per_block=2), IDEAL, 256, 10)
    head = MODEL.vocab_size * MODEL.hidden_size
    body = roofline.matrix_parameters(shape(MODEL)) - head
    flops = 2 * body * 256 * 6 + 2 * head * 256 * 3
    assert tally.parts["products"] == pytest.approx(flops / IDEAL.bf16_flops, rel=1e-3) and "weights" not in tally.parts


def test_numbers_of_the_8b_model() -> None:
    """36 layers x 8 heads x 128 x 2 x 2 bytes; 15.14 GB of matrices in 3.15 ms on an H200."""
    assert cache_bytes(MODEL, 2) == 147_456
    tally = cost_of_a_pass(MODEL, Layout(), Workload(), IDEAL, 1, 0)
    assert tally.parts["weights"] == pytest.approx(3.15e-3, rel=3e-3)


def test_weights_in_fp8_are_half_the_bytes_of_the_layers_and_their_inputs_are_rounded() -> None:
    half, layers = Layout(rollout_fp8=True), 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    ideal = dataclasses.replace(IDEAL, fp8_fraction=1)
    bf16, fp8 = (cost_of_a_pass(MODEL, one, Workload(), ideal, 1, 100).parts for one in (Layout(), half))
    assert bf16["weights"] - fp8["weights"] == pytest.approx(layers / ideal.memory_bandwidth, rel=1e-3)
    rounded = 6 * 36 * (2 * 4096 + 4096 + 12288) * (2 + 1)  # numbers of 6 tokens, read in bfloat16 and written
    assert fp8["memory"] - bf16["memory"] == pytest.approx(rounded / ideal.memory_bandwidth, rel=1e-6)
    bf16, fp8 = (cost_of_a_pass(MODEL, one, Workload(), ideal, 4096, 100) for one in (Layout(), half))
    less = 2 * layers * 4096 * 6 * (1 / ideal.bf16_flops - 1 / ideal.fp8_flops)
    assert bf16.parts["products"] - fp8.parts["products"] == pytest.approx(less, rel=1e-3) and bf16.flops == fp8.flops
    assert fp8.parts["keys and values"] == bf16.parts["keys and values"]
    first, second = (refit_cost(MODEL, one, Workload(), ideal).seconds for one in (Layout(), half))
    assert first == 0 and second == pytest.approx(3 * layers / ideal.memory_bandwidth, rel=1e-3)
    with pytest.raises(ConfigError, match="a100 has no products in FP8"):
        cost_of_a_pass(MODEL, half, Workload(), HARDWARE["a100"], 1, 100)


def test_experts_are_read_when_a_token_comes() -> None:
    assert experts_touched(MOE, 1) == pytest.approx(8 / 128)
    assert experts_touched(MOE, 2) == pytest.approx(1 - (15 / 16) ** 2)
    assert experts_touched(MOE, 1000) == pytest.approx(1) and experts_touched(MODEL, 1) == 1
    few, many = (cost_of_a_pass(MOE, Layout(), Workload(), IDEAL, n, 0).parts["weights"] for n in (1, 64))
    read = 2 * 48 * 128 * 3 * 2048 * 768 * ((15 / 16) ** 6 - (15 / 16) ** 384)  # experts that 6 tokens leave alone
    assert many - few == pytest.approx(read / IDEAL.memory_bandwidth)


def test_tensor_parallel_ranks_share_what_is_read_and_talk() -> None:
    one = cost_of_a_pass(MODEL, Layout(), Workload(), IDEAL, 4, 500)
    four = cost_of_a_pass(MODEL, Layout(world=4, tp=4), Workload(), IDEAL, 4, 500)
    assert four.parts["weights"] == pytest.approx(one.parts["weights"] / 4)
    assert four.parts["keys and values"] == pytest.approx(one.parts["keys and values"] / 4)
    # Two all-reduces a layer of 4 x 4 x 1.5 tokens, each moving twice three quarters.
    assert four.sent["tensor", "node"] == pytest.approx(36 * 2 * 2 * 0.75 * 24 * 4096 * 2)


# ------------------------------------------------------------------------------------------------------------ the queue
def passes(length: float, running: int, context: float, workload: Workload, model=MODEL) -> float:
    """Seconds in which `running` responses gain `length` tokens."""
    one = cost_of_a_pass(model, Layout(), workload, HARDWARE["h100"], running, context).seconds
    return length / workload.block_size * workload.steps_per_block * one


def prompt_seconds(workload: Workload) -> float:
    return prefill(MODEL, Layout(), workload, HARDWARE["h100"]).seconds


def test_equal_responses_run_together() -> None:
    work = Workload(prompts=2, samples=8, prompt_length=100, responses=(400,))
    found = rollout_cost(MODEL, Layout(), work, HARDWARE["h100"])
    assert found.seconds == pytest.approx(passes(400, 16, 300, work) + 2 * prompt_seconds(work))
    assert found.facts["most in flight"] == 16


def test_the_longest_runs_alone_at_the_end() -> None:
    work = Workload(prompts=1, samples=2, prompt_length=100, responses=(100, 1000))
    found = rollout_cost(MODEL, Layout(), work, HARDWARE["h100"])
    expected = passes(100, 2, 150, work) + passes(900, 1, 650, work) + prompt_seconds(work)
    assert found.seconds == pytest.approx(expected)


def test_what_does_not_fit_waits() -> None:
    work = Workload(prompts=4, samples=1, prompt_length=100, responses=(400,), max_running=2)
    found = rollout_cost(MODEL, Layout(), work, HARDWARE["h100"])
    assert found.seconds == pytest.approx(2 * passes(400, 2, 300, work) + 4 * prompt_seconds(work))
    # One prompt's responses that do not fit together take turns.
    one = dataclasses.replace(work, prompts=1, samples=4)
    found = rollout_cost(MODEL, Layout(), one, HARDWARE["h100"])
    assert found.seconds == pytest.approx(2 * passes(400, 2, 300, one) + prompt_seconds(one))


def test_an_idle_engine_helps_out() -> None:
    """Two engines, five prompts of one response, room for one: three rounds, not more."""
    work = Workload(prompts=5, samples=1, prompt_length=100, responses=(400,), max_running=1)
    found = rollout_cost(MODEL, Layout(world=2), work, HARDWARE["h100"])
    assert found.seconds == pytest.approx(3 * (passes(400, 1, 300, work) + prompt_seconds(work)))
    assert found.facts["mean over engines of their time, of the slowest"] == pytest.approx(5 / 6)


def test_engines_beyond_the_prompts_are_idle() -> None:
    work = Workload(prompts=2, samples=4, responses=(400,))
    found = [rollout_cost(MODEL, Layout(world=world), work, HARDWARE["h100"]).seconds for world in (2, 4, 8)]
    assert found[0] == pytest.approx(found[1]) == pytest.approx(found[2])


def test_room_of_a_cache() -> None:
    """A hundred responses of 400 tokens and a share of their prompt in each."""
    work = Workload(prompts=1, samples=4, prompt_length=80, responses=(400,))
    assert room_for(Layout(), work, MODEL, 100 * 420 * 147_456 + 1) == 100
    assert room_for(Layout(world=4, tp=4), work, MODEL, 25 * 420 * 147_456 + 1) == 100
    assert room_for(Layout(), work, MODEL, 1.0) == 1 and room_for(Layout(), work, MODEL, None) == 256
