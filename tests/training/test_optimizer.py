"""Learning rate and weight decay of each step against formulas written by hand, and which parameters decay."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.optimizer import OptimizerConfig
from tests.harness import pool
from tests.tiny import make_state

HIGH, LOW, STEPS = 1.0, 0.1, 20


def state_of(train_iters: int = STEPS, **settings: object):
    values = dict(lr=HIGH, min_lr=LOW) | settings
    return make_state(torch.float32, optimizer=OptimizerConfig(**values), train_iters=train_iters)


def rates(count: int = STEPS + 3, **settings: object) -> list[float]:
    """The rates of the first updates."""
    state, found = state_of(**settings), []
    for _ in range(count):
        found.append(state.learning_rate())
        state.scheduler.step(1)
    return found


def after_warmup(shape, warmup: int = 0):
    """LOW + (HIGH - LOW) shape(share of the schedule that is over), which begins at the end of the warm-up."""
    return lambda step: LOW + (HIGH - LOW) * shape((step - warmup) / (STEPS - warmup))


def wsd(shape, end: int, warmup: int = 0):
    def rate(step: int) -> float:
        if step <= STEPS - end:
            return HIGH
        return LOW + (HIGH - LOW) * shape((step - (STEPS - end)) / end)

    return rate


HALF_COSINE = lambda x: (1 + math.cos(math.pi * x)) / 2
SHAPES = {
    "constant": (dict(), lambda step: HIGH),
    "linear": (dict(lr_decay_style="linear", lr_warmup_iters=4), after_warmup(lambda x: 1 - x, 4)),
    "cosine": (dict(lr_decay_style="cosine", lr_warmup_iters=4), after_warmup(HALF_COSINE, 4)),
    "inverse square root": (
        dict(lr_decay_style="inverse-square-root", lr_warmup_iters=4),
        lambda step: max(LOW, HIGH * math.sqrt(4 / max(step, 1))),
    ),
    "wsd linear": (
        dict(lr_decay_style="WSD", lr_wsd_decay_iters=5, lr_wsd_decay_style="linear", lr_warmup_iters=4),
        wsd(lambda x: 1 - x, 5),
    ),
    "wsd cosine": (
        dict(lr_decay_style="WSD", lr_wsd_decay_iters=5, lr_wsd_decay_style="cosine"),
        wsd(HALF_COSINE, 5),
    ),
    "wsd exponential": (dict(lr_decay_style="WSD", lr_wsd_decay_iters=8), wsd(lambda x: 2 * 0.5**x - 1, 8)),
    "wsd square root": (
        dict(lr_decay_style="WSD", lr_wsd_decay_iters=8, lr_wsd_decay_style="minus_sqrt"),
        wsd(lambda x: 1 - math.sqrt(x), 8),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_schedule_is_its_formula(name: str) -> None:
    """Beyond its end a schedule stays where it has come to."""
    settings, formula = SHAPES[name]
    warmup = settings.get("lr_warmup_iters", 0)
    for step, rate in enumerate(rates(**settings)):
        over = step > STEPS and "constant" not in name
        expected = step / warmup * HIGH if step < warmup else LOW if over else formula(step)
        assert rate == pytest.approx(expected, abs=1e-12), step


def test_a_warm_up_from_a_share_and_from_a_rate() -> None:
    """0.27 of 20 steps are 5 whole ones."""
    found = rates(lr_warmup_fraction=0.27, lr_warmup_init=0.5, lr_decay_style="linear")
    assert found[:6] == pytest.approx([0.5 + 0.1 * step for step in range(6)])
    assert found[6] == pytest.approx(LOW + (HIGH - LOW) * 14 / 15)
    assert rates(lr_warmup_fraction=0.5, lr_decay_iters=4, lr_decay_style="linear")[:3] == [0, 0.5, 1]


@pytest.mark.parametrize(("style", "shape"), [("linear", lambda x: x), ("cosine", lambda x: 1 - HALF_COSINE(x))])
def test_weight_decay_that_increases(style: str, shape) -> None:
    state = state_of(weight_decay_incr_style=style, start_weight_decay=0.1, end_weight_decay=0.3, lr_decay_iters=7)
    for step in range(STEPS + 3):
        for group in state.optimizer.param_groups:
            expected = group["wd_mult"] * (0.1 + 0.2 * shape(min(1, step / STEPS)))
            assert group["weight_decay"] == pytest.approx(expected, abs=1e-12)
        state.scheduler.step(1)


def shrunk(**settings: object) -> set[str]:
    """The parameters that an update without gradients makes smaller."""
    state = state_of(lr=0.1, min_lr=0.0, weight_decay=0.5, **settings)
    before = {name: parameter.detach().clone() for name, parameter in state.named_parameters()}
    with platform.cuda_calls_on_cpu():
        state.optimizer.step()
    after = dict(state.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value) or torch.allclose(after[name], value * (1 - 0.1 * 0.5)), name
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


def test_what_decays() -> None:
    state = state_of()
    matrices = {name for name, parameter in state.named_parameters() if parameter.ndim > 1}
    table = "embedding.word_embeddings.weight"
    assert table in matrices and len(matrices) < len(list(state.named_parameters()))
    assert shrunk() == matrices
    assert shrunk(no_weight_decay_embeddings=True) == matrices - {table}


def resumed(folder) -> dict[str, list[float]]:
    """Rates and decays of a whole run; of one that stops after 6 steps; and of one that goes on with other flags."""
    from megatron_dlm.checkpoint.distributed import load, save

    settings = dict(lr_decay_style="WSD", lr_wsd_decay_iters=9, lr_warmup_iters=4, weight_decay_incr_style="linear")
    settings |= dict(start_weight_decay=0.0, end_weight_decay=0.2)

    def steps(state, count: int) -> list[float]:
        found = []
        for _ in range(count):
            matrices = max(group["weight_decay"] for group in state.optimizer.param_groups)
            found += [state.learning_rate(), matrices]
            state.scheduler.step(1)
        return found

    first = state_of(**settings)
    whole, stopped = steps(first, 6), state_of(**settings)
    steps(stopped, 6)
    save(stopped, folder, 6, {})
    again, other = state_of(**settings), state_of(**settings | dict(lr=2 * HIGH, min_lr=2 * LOW))
    load(again, folder)
    put, seen = other.optimizer.load_state_dict, []

    def spy(loaded) -> None:
        seen.extend(group["max_lr"] for group in loaded.get("optimizer", loaded)["param_groups"])
        put(loaded)

    with mock.patch.object(other.optimizer, "load_state_dict", spy):
        load(other, folder)
    assert set(seen) == {2 * HIGH}  # newer releases of megatron-core find a group by its rates, too
    return {"begin": whole, "rest": steps(first, 16), "again": steps(again, 16), "other": steps(other, 16)}


def test_a_resumed_run_keeps_its_place_and_follows_the_flags_of_today(tmp_path) -> None:
    found = pool(1).run(resumed, tmp_path)[0]
    assert found["again"] == found["rest"]
    assert found["other"][0::2] == pytest.approx([2 * rate for rate in found["rest"][0::2]])
    assert found["other"][1::2] == found["rest"][1::2]
    assert found["begin"][:4] == pytest.approx([0, 0, 0.25, 0.2 / STEPS])
