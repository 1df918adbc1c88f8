"""TraceRL on models of full attention: the trainer sees the states in which the engine decided."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import ROW_MULTIPLE, Load, pack
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.views import split_views, trace_views
from megatron_dlm.model.policy import label_logprobs, policy_scores
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.diffusion.oracles import MASK_ID, PAD_ID, states, trace_item
from tests.rl.test_trainer import RL, ROLLOUT, EvenFirst, prompts
from tests.tiny import (
    allowed_logprobs,
    disturb,
    explicit_logits,
    make_model,
    make_session,
    quiet,
    vocabulary,
)

SAMPLING = SamplingParams(
    max_new_tokens=14,
    block_size=4,
    denoising_steps=4,
    stop_token_ids=tuple(range(3, 50, 16)),
    threshold=0.3,
    prefix_cache=False,
)
WAYS = {
    "dynamic": {},
    "static": dict(remasking="static"),
    "two steps a block": dict(remasking="static", denoising_steps=2),
    "one step a block": dict(remasking="static", denoising_steps=1),
    "blocks of 5, top-p, cool": dict(block_size=5, denoising_steps=5, top_p=0.9, temperature=0.7),
    "one block": dict(block_size=32, denoising_steps=32),
    "never stops": dict(ignore_eos=True, remasking="static"),
    "greedy": dict(temperature=0.0),
}
HORIZONS = [None, 0, 3]


@pytest.fixture(scope="module", params=[0, 1], ids=["in place", "logits ahead"])
def shift(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def model(shift: int):
    return make_model(torch.float64, full_attention=True, block_size=None, logit_shift=shift)


def rollout(model, sampling: SamplingParams, count: int = 12) -> list[Trace]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, 1 + n) for n in range(count)]
    engine = Engine(model, vocabulary(), EngineOptions(count, 40, full_attention=True, page_size=3))
    return engine.run(
        [Request(ids, sampling, f"p{n}", 0, rollout_stream(1, 0, f"p{n}", 0)) for n, ids in enumerate(prompts)]
    )


@torch.no_grad()
def trained_on(model, traces: list[Trace], shrinkage: int = 1, budget: int = 64) -> list[np.ndarray]:
    """Log-probability of every response token in the rows that it is trained in."""
    found = [np.full(len(trace.response_ids), np.nan) for trace in traces]
    parts = [
        (number, part)
        for number, trace in enumerate(traces)
        for part in split_views(trace_item(trace, Grid(None), shrinkage), budget)
    ]
    plan = pack([Load(part.group, part.shared_length, part.own_length) for _, part in parts], budget, 1, ROW_MULTIPLE)
    for members in plan.ranks[0]:
        row = build_row([parts[index] for index in members], plan.length, MASK_ID, PAD_ID)
        targets = row.targets
        temperatures = [traces[one].sampling.policy_temperature for one in targets.response.tolist()]
        scores = policy_scores(model.forward_row(row), torch.tensor(temperatures, dtype=torch.float64), vocabulary())
        values = label_logprobs(scores, targets.label).double()
        for response, index, value in zip(targets.response.tolist(), targets.index.tolist(), values.tolist()):
            assert np.isnan(found[response][index]), "a token is predicted twice"
            found[response][index] = value
    return found


@pytest.mark.parametrize(
    "way, horizon", [*((way, None) for way in WAYS), *((way, h) for way in ("static", "dynamic") for h in HORIZONS[1:])]
)
def test_the_trainer_gives_the_probabilities_of_the_rollout(model, way: str, horizon: int | None) -> None:
    traces = rollout(model, dataclasses.replace(SAMPLING, **{**WAYS[way], "horizon": horizon}))
    for trace, found in zip(traces, trained_on(model, traces)):
        np.testing.assert_allclose(found, trace.logprobs, rtol=0, atol=1e-10)
    if way == "dynamic":
        assert any(len(trace.tail_ids) for trace in traces), "no response stops inside its block"
        assert any(len(trace.tokens) > len(trace.prompt_ids) + 4 for trace in traces), "one block each"
        assert {trace.finish_reason for trace in traces} == {"stop", "length"}


def test_in_single_precision_too(shift: int) -> None:
    model = make_model(torch.float32, full_attention=True, block_size=None, logit_shift=shift)
    for horizon in HORIZONS:
        traces = rollout(model, dataclasses.replace(SAMPLING, horizon=horizon))
        for trace, found in zip(traces, trained_on(model, traces)):
            np.testing.assert_allclose(found, trace.logprobs, rtol=0, atol=1e-4)


def naive(model, trace: Trace, shrinkage: int) -> np.ndarray:
    """A forward pass over the canvas for every state."""
    found = np.full(len(trace.response_ids), np.nan)
    for state in states(trace, Grid(None), shrinkage):
        length, read = len(state.shown), [position - model.logit_shift for position in state.decided]
        whole = torch.ones(length, length, dtype=torch.bool)
        logits = explicit_logits(model, torch.tensor(state.shown), torch.arange(length), whole, torch.tensor(read))
        logprobs = allowed_logprobs(logits, trace.sampling.policy_temperature)
        for line, position in enumerate(state.decided):
            found[position - len(trace.prompt_ids)] = logprobs[line, trace.tokens[position]].item()
    return found


@pytest.mark.parametrize("shrinkage", [2, 3, 50])
@pytest.mark.parametrize("horizon", [None, 1])
def test_merged_steps_are_learned_in_the_state_of_the_first(model, shrinkage: int, horizon: int | None) -> None:
    traces, different = rollout(model, dataclasses.replace(SAMPLING, remasking="static", horizon=horizon), 5), 0
    for trace, found in zip(traces, trained_on(model, traces, shrinkage)):
        with torch.no_grad():
            np.testing.assert_allclose(found, naive(model, trace, shrinkage), rtol=0, atol=1e-10)
        views = trace_views(trace, Grid(None), shrinkage)
        assert len(views.block) <= -(-trace.num_steps // shrinkage)
        different += int((np.abs(found - trace.logprobs) > 1e-6).sum())
    assert different > 3


@pytest.mark.parametrize("horizon", HORIZONS)
def test_a_prefix_cache_is_learned_as_the_exact_policy(model, horizon: int | None) -> None:
    """Its log-probabilities are those of older keys, but for the first step of a block."""
    how = dataclasses.replace(SAMPLING, prefix_cache=True, horizon=horizon, remasking="static")
    traces, first, later = rollout(model, how), [], []
    for trace, found in zip(traces, trained_on(model, traces)):
        with torch.no_grad():
            np.testing.assert_allclose(found, naive(model, trace, 1), rtol=0, atol=1e-10)
        block = np.arange(len(trace.all_steps)) // 4
        begun = np.array([trace.all_steps[block == one].min() for one in block])[: len(found)]
        difference = np.abs(found - trace.logprobs)
        first += difference[trace.steps == begun].tolist()
        later += difference[trace.steps != begun].tolist()
    assert max(first) < 1e-10 < 1e-4 < max(later)


def test_an_aborted_response_and_what_came_of_it(model) -> None:
    rng = np.random.default_rng(3)
    how = dataclasses.replace(SAMPLING, ignore_eos=True, remasking="static")
    request = Request(rng.integers(0, 50, 4), how, "p", 0, rollout_stream(1, 0, "p", 0))
    engine = Engine(model, vocabulary(), EngineOptions(1, 40, full_attention=True, page_size=3))
    engine.submit([request])
    for _ in range(6):
        engine.step()
    (begun,) = engine.abort()
    assert begun.finish_reason == "abort" and len(begun.response_ids) == 4
    (whole,) = engine.run([dataclasses.replace(request, partial=begun)])
    for trace, found in zip((begun, whole), trained_on(model, [begun, whole])):
        np.testing.assert_allclose(found, trace.logprobs, rtol=0, atol=1e-10)


def trainer(shift: int, budget: int):
    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.rl.trainer import TraceRLTrainer
    from megatron_dlm.rollout.rig import RolloutRig

    session = make_session(full_attention=True, block_size=None, logit_shift=shift)
    rollout = dataclasses.replace(ROLLOUT, rollout_block_size=4, prefix_cache=False, horizon=3, remasking="static")
    state = session.train_state(OptimizerConfig(lr=2e-3, clip_grad=1.0), 100)
    disturb(state.module, 0)
    rig = RolloutRig.open(session, state, rollout, 6, rollout.rollout_max_response_len)
    rl = dataclasses.replace(RL, max_tokens_per_row=budget)
    return TraceRLTrainer(session, state, rig, EvenFirst(), prompts(13), rl, rollout, seed=5)


def test_a_step_is_the_same_in_rows_of_one_copy_and_of_many(shift: int) -> None:
    """15 tokens hold one canvas: 6 of the longest prompt and 9 of the response."""
    metrics, other = (trainer(shift, budget).step(quiet()) for budget in (15, 400))
    assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-5 and metrics["train/targets"] > 48
    for name, value in metrics.items():
        if not name.startswith("perf/"):
            assert other[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    with pytest.raises(ConfigError, match="--max-tokens-per-row 14 is too small: one sample may need 15"):
        trainer(shift, 14)


def test_rewards_rise() -> None:
    one = trainer(0, 64)
    rewards = [one.step(quiet())["rollout/reward"] for _ in range(10)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15, rewards
