"""Bytes by formula against counts that are written out, and what fits against what does not."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dlm.config.model import ModelConfig
from megatron_dlm.model.shape import resolve
from megatron_dlm.planning import fit
from megatron_dlm.planning.hardware import HARDWARE
from megatron_dlm.planning.layout import Layout, Workload
from megatron_dlm.planning.precision import Precision

MODEL = resolve(ModelConfig(model_preset="sdar-8b"), None)
H100 = HARDWARE["h100"]
WORK = Workload(prompts=16, samples=8, row_budget=8192)


def test_eighteen_bytes_a_parameter() -> None:
    """bf16 weight, fp32 gradient, and Adam's 12 bytes, the last divided over replicas."""
    parameters = 8.19e9
    assert fit.static_bytes(MODEL, Layout(), WORK) == pytest.approx(18 * parameters, rel=1e-3)
    assert fit.static_bytes(MODEL, Layout(world=8), WORK) == pytest.approx((6 + 12 / 8) * parameters, rel=1e-3)
    whole = Layout(world=8, distributed_optimizer=False)
    assert fit.static_bytes(MODEL, whole, WORK) == pytest.approx(18 * parameters, rel=1e-3)
    split = Layout(world=8, tp=2, cp=2, sequence_parallel=True)  # context ranks are replicas
    assert fit.static_bytes(MODEL, split, WORK) == pytest.approx((6 + 12 / 4) * parameters / 2, rel=1e-3)
    with_value = dataclasses.replace(WORK, value_model=True)
    head = 151936 * 4096
    assert fit.static_bytes(MODEL, Layout(), with_value) == pytest.approx(18 * (2 * parameters - head), rel=1e-3)


def test_an_engine_in_the_layout_of_training_costs_no_weights() -> None:
    assert fit.engine_bytes(MODEL, Layout(world=8, tp=2, sequence_parallel=True), WORK) == 0
    assert fit.engine_bytes(MODEL, Layout(world=8, tp=2, rollout_tp=1), WORK) == pytest.approx(2 * 8.19e9, rel=1e-3)
    assert fit.engine_bytes(MODEL, Layout(world=8, tp=2, pp=2), WORK) == pytest.approx(8.19e9, rel=1e-3)


def test_activations() -> None:
    """Halved by tensor parallelism with sequence parallelism and by context parallelism; a pipeline keeps as many rows
    as it has stages; recomputed layers keep their input."""
    size = lambda rows=8, **layout: fit.activation_bytes(MODEL, Layout(**layout), WORK, 8192, rows)
    logits = lambda tp: fit.LOSS_CHUNK * 151936 / tp * 16  # 1187 x 128 tokens: no padding
    plain = size() - logits(1)
    assert size(world=2, tp=2, sequence_parallel=True) - logits(2) == pytest.approx(plain / 2)
    assert size(world=2, cp=2) - logits(1) == pytest.approx(plain / 2)
    assert size(world=4, pp=4) - logits(1) == pytest.approx(plain)
    assert size(rows=1, world=4, pp=4) - logits(1) == pytest.approx(plain / 4)
    kept = 8192 * 4096 * 2 * 36
    assert size(recompute="full") - logits(1) == pytest.approx(kept + plain / 36)


def test_what_fits() -> None:
    """8 billion parameters at 18 bytes do not stand on one device of 80 GB; over eight they do; 30 billion on eight do
    only with all of them sharing."""
    assert not fit.fits(MODEL, Layout(), WORK, H100)
    assert fit.fits(MODEL, Layout(world=8, tp=2, sequence_parallel=True), WORK, H100)
    assert not fit.fits(MODEL, Layout(world=8, tp=3), WORK, H100)  # refused, so it does not fit either
    assert not fit.fits(MODEL, Layout(world=8, tp=2), dataclasses.replace(WORK, row_budget=600), H100)
    large = resolve(ModelConfig(model_preset="sdar-30b-a3b"), None)
    assert not fit.fits(large, Layout(world=8), WORK, H100)


def test_fp8_adds_copies_and_takes_away_half_of_what_products_read() -> None:
    numbers = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    plain, bf16, fp8 = (Layout(precision=one) for one in (Precision(), Precision(True), Precision(True, "tensorwise")))
    gather = Layout(precision=Precision(True, "tensorwise", gather=True))
    static = [fit.static_bytes(MODEL, layout, WORK) for layout in (plain, bf16, fp8, gather)]
    assert static[0] == static[1] == static[3] and static[2] - static[1] == pytest.approx(2 * numbers, rel=1e-3)
    kept = [fit.activation_bytes(MODEL, layout, WORK, 8192, 1) for layout in (plain, bf16, fp8)]
    assert kept[0] - kept[1] == pytest.approx(36 * 8192 * 2 * 12288)
    assert kept[1] - kept[2] == pytest.approx(36 * 8192 * (2 * 4096 + 12288))


def test_room_is_what_is_left() -> None:
    layout = Layout(world=8, tp=2, sequence_parallel=True)
    room = fit.cache_room(MODEL, layout, WORK, H100)
    left = 80e9 * fit.USABLE - fit.static_bytes(MODEL, layout, WORK)
    assert room == pytest.approx(left * fit.CACHE)
    assert fit.cache_room(MODEL, layout, WORK, HARDWARE["h200"]) > room
    assert fit.cache_room(MODEL, Layout(), WORK, H100) is None
