"""Rollouts in blocks of 4, learned in blocks of 8: how a model grows its blocks (TraceRL, arXiv 2509.06949, 5.8)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Load, pack
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.diffusion.views import trace_views
from megatron_dlm.model.policy import label_logprobs, policy_scores
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.diffusion.oracles import MASK_ID, PAD_ID, trace_item
from tests.rollout.naive import generate
from tests.tiny import allowed_logprobs, explicit_logits, make_model, vocabulary

SMALL, LARGE = 4, 8
SAMPLING = SamplingParams(max_new_tokens=14, stop_token_ids=(5, 6, 7), threshold=0.3, block_size=SMALL)


def rollout(model) -> list[tuple[Request, Trace]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, 1 + n) for n in range(10)]
    wanted = [
        Request(prompt, SAMPLING, f"p{n}", sample, rollout_stream(1, 0, f"p{n}", sample))
        for n, prompt in enumerate(prompts)
        for sample in range(2)
    ]
    found = Engine(model, vocabulary(), EngineOptions(8, 40)).run(wanted)
    by_key = {(trace.prompt_key, trace.sample): trace for trace in found}
    return [(request, by_key[request.prompt_key, request.sample]) for request in wanted]


@pytest.fixture(scope="module")
def large():
    return make_model(torch.float64, block_size=LARGE)


def test_the_engine_attends_in_the_blocks_that_it_decodes_in(large) -> None:
    """The naive engine's mask lets a position see the blocks of 4 up to its own, whatever the model was built for."""
    for request, trace in rollout(large):
        naive = generate(large, request)
        assert trace.response_ids.tolist() == naive.response and trace.steps.tolist() == naive.steps
        assert trace.tail_ids.tolist() == naive.tail and trace.tail_steps.tolist() == naive.tail_steps
        np.testing.assert_allclose(trace.logprobs, naive.logprobs, rtol=0, atol=1e-10)


BEHIND = range(12, 16)  # masks where the rollout in blocks of 4 had ended


def hand_made() -> Trace:
    """Two prompt tokens; decoding blocks 0-3, 4-7 and 8-11; the response has 9 tokens, the tail is position 11."""
    return Trace(
        prompt_ids=np.array([10, 11]),
        response_ids=np.arange(20, 29),
        tail_ids=np.array([29]),
        #               2  3 | 4  5  6  7 | 8  9 10 (11)
        steps=np.array([2, 1, 4, 3, 4, 5, 6, 7, 6]),
        tail_steps=np.array([7]),
        logprobs=np.zeros(9),
        sampling_logprobs=np.zeros(9),
        weight_versions=np.zeros(9, dtype=np.int64),
        sampling=dataclasses.replace(SAMPLING, denoising_steps=4),
        prompt_key="p",
        sample=0,
        finish_reason="stop",
        num_forwards=7,
    )


@pytest.mark.parametrize("shrinkage", [1, 2])
def test_views_of_the_larger_block_follow_the_order_of_the_trace(shrinkage: int) -> None:
    views = trace_views(hand_made(), Grid(LARGE), shrinkage)
    shown = [
        (int(block), *(set(position[chosen & (position >= 0)].tolist()) for chosen in (masked, target)))
        for block, position, masked, target in zip(views.block, views.position, views.masked, views.target)
    ]
    if shrinkage == 1:
        assert shown == [
            (0, {2, 3, 4, 5, 6, 7}, {3}),
            (0, {2, 4, 5, 6, 7}, {2}),
            (0, {4, 5, 6, 7}, {5}),
            (0, {4, 6, 7}, {4, 6}),
            (0, {7}, {7}),
            (1, {8, 9, 10, 11, *BEHIND}, {8, 10}),  # the block is shown whole
            (1, {9, 11, *BEHIND}, {9}),  # the tail is hidden and not predicted
        ]
    else:
        assert shown == [
            (0, {2, 3, 4, 5, 6, 7}, {2, 3}),
            (0, {4, 5, 6, 7}, {4, 5, 6}),
            (0, {7}, {7}),
            (1, {8, 9, 10, 11, *BEHIND}, {8, 9, 10}),
        ]


@torch.no_grad()
def test_training_computes_the_policy_of_the_larger_block(large) -> None:
    """Log-probabilities of rows, against one pass per token over the text as it stands in blocks of 8."""
    traces = [trace for _, trace in rollout(large)]
    items = [trace_item(trace, Grid(LARGE)) for trace in traces]
    plan = pack([Load(item.group, item.shared_length, item.own_length) for item in items], 512, 1, 16)
    count, moved = 0, 0
    for members in plan.ranks[0]:
        row = build_row([(n, items[n]) for n in members], plan.length, MASK_ID, PAD_ID).to(platform.device())
        scores = policy_scores(large.forward_row(row), 1.0, vocabulary())
        trained = label_logprobs(scores, row.targets.label).tolist()
        for found, n, index in zip(trained, row.targets.response.tolist(), row.targets.index.tolist()):
            assert found == pytest.approx(naive_logprob(large, traces[n], index), abs=1e-10)
            count, moved = count + 1, moved + (abs(found - traces[n].logprobs[index]) > 1e-3)
    assert count == sum(len(trace.response_ids) for trace in traces) > 100
    assert moved > count / 2  # it is another policy than that of the rollout


def naive_logprob(model, trace: Trace, index: int) -> float:
    """Of one response token, when everything of its block of 8 that was not decided before it is hidden."""
    prompt, tokens, steps = len(trace.prompt_ids), trace.tokens.tolist(), trace.all_steps.tolist()
    place = prompt + index
    end = (place // LARGE + 1) * LARGE
    tokens += [MASK_ID] * (end - len(tokens))
    steps += [steps[index]] * (end - prompt - len(steps))  # never decided
    text = [
        MASK_ID if p >= prompt and p // LARGE == place // LARGE and steps[p - prompt] >= steps[index] else tokens[p]
        for p in range(end)
    ]
    position = torch.arange(end)
    mask = (position // LARGE)[None, :] <= (position // LARGE)[:, None]
    logits = explicit_logits(model, torch.tensor(text), position, mask, torch.tensor([place]))
    return float(allowed_logprobs(logits)[0, tokens[place]])
