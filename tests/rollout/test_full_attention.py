"""Decoding under full attention, and with logits ahead, against the naive oracles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.rollout import naive, naive_full
from tests.rollout.test_engine import by_key, same
from tests.tiny import make_model, vocabulary

SAMPLING = SamplingParams(max_new_tokens=11, block_size=4, denoising_steps=4, stop_token_ids=(5, 6, 7), threshold=0.3)
WAYS = {
    "as it is": {},
    "static": dict(remasking="static"),
    "static, 2 steps": dict(remasking="static", denoising_steps=2),
    "margin": dict(confidence="margin", remasking="static"),
    "untempered": dict(confidence="untempered", temperature=0.7),
    "greedy": dict(temperature=0.0),
    "blocks of 32": dict(block_size=32, denoising_steps=32),
    "blocks of 5, 3 steps": dict(block_size=5, denoising_steps=3, remasking="static"),
    "never stops": dict(ignore_eos=True),
}
CUTS = {
    "exact": dict(prefix_cache=False),
    "exact, horizon 2": dict(prefix_cache=False, horizon=2),
    "prefix cache": dict(),
    "prefix cache, horizon 0": dict(horizon=0),
    "prefix cache, horizon 3": dict(horizon=3),
}


@pytest.fixture(scope="module", params=[0, 1], ids=["in place", "logits ahead"])
def model(request):
    return make_model(torch.float64, full_attention=True, block_size=None, logit_shift=request.param)


def requests(sampling: SamplingParams, count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(0, 50, 1 + n % 9), sampling, f"p{n}", 0, rollout_stream(1, 0, f"p{n}", 0))
        for n in range(count)
    ]


def engine(model, **changes) -> Engine:
    settings = dict(max_running_requests=5, max_length=40, full_attention=True, page_size=3)
    return Engine(model, vocabulary(), EngineOptions(**settings | changes))


def is_naive(trace, expected) -> None:
    assert trace.response_ids.tolist() == expected.response
    assert trace.tail_ids.tolist() == expected.tail
    assert trace.steps.tolist() == expected.steps
    assert trace.tail_steps.tolist() == expected.tail_steps
    assert (trace.finish_reason, trace.num_forwards) == (expected.reason, expected.forwards)
    np.testing.assert_allclose(trace.logprobs, expected.logprobs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "way, cut", [*((way, "prefix cache, horizon 3") for way in WAYS), *(("static", cut) for cut in CUTS)]
)
def test_responses_are_those_of_the_naive_loop(model, way: str, cut: str) -> None:
    wanted = requests(dataclasses.replace(SAMPLING, **WAYS[way], **CUTS[cut]), 3)
    found = by_key(engine(model).run(wanted))
    for request in wanted:
        is_naive(found[request.prompt_key, 0], naive_full.generate(model, request))


def mixed() -> list[Request]:
    """Every way and every cut, among each other."""
    settings = [{**way, **cut} for way in WAYS.values() for cut in CUTS.values()]
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(SAMPLING, **changes))
        for request, changes in zip(requests(SAMPLING, len(settings)), settings, strict=True)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        dict(max_running_requests=1),
        dict(max_tokens_per_pass=1),
        dict(max_tokens_per_pass=30, page_size=16),
        dict(kv_cache_bytes=16 * 3 * 512),  # 16 pages
        dict(masked_head=False, share_prompts=False, fuse_commit=False),
    ],
    ids=str,
)
def test_neither_company_nor_memory_changes_a_response(model, changes: dict) -> None:
    wanted = mixed()
    reference = by_key(engine(model, max_running_requests=50).run(wanted))
    one = engine(model, **changes)
    found = by_key(one.run(wanted[::-1]))
    for key, trace in found.items():
        same(trace, reference[key])
    assert one.scheduler.pool.num_free == one.scheduler.pool.num_pages


def test_a_cache_that_is_lost_changes_no_response(model) -> None:
    """Blocks that had begun begin anew, and draw the same tokens."""
    wanted = mixed()
    reference = by_key(engine(model).run(wanted))
    one, finished = engine(model), []
    one.submit(wanted)
    while not one.idle:
        finished += one.step()
        if one.stats.passes in (2, 9, 11, 50, 99):
            one.sleep()
            assert one.kv_cache_bytes == 0
    for key, trace in by_key(finished).items():
        same(trace, reference[key])


def test_an_aborted_response_goes_on_where_it_was(model) -> None:
    wanted = mixed()
    reference = by_key(engine(model).run(wanted))
    one, finished, todo, rounds = engine(model), [], wanted, 0
    while todo:
        one.submit(todo)
        for _ in range(7 + 9 * rounds):  # a block takes up to 32 steps, and is dropped if it is not finished
            finished += one.step()
        begun = {(trace.prompt_key, trace.sample): trace for trace in one.abort()}
        done = {(trace.prompt_key, trace.sample) for trace in finished}
        todo = [
            dataclasses.replace(request, partial=begun.get((request.prompt_key, 0), request.partial))
            for request in wanted
            if (request.prompt_key, 0) not in done
        ]
        rounds += 1
        assert rounds < 30
    for key, trace in by_key(finished).items():
        trace.num_forwards = reference[key].num_forwards  # those of the dropped blocks were forwards too
        same(trace, reference[key])
    assert rounds > 3


@pytest.mark.parametrize("page_size, limit, masked_head", [(16, 8192, False), (3, 9, True)])
def test_block_models_may_have_their_logits_ahead(page_size: int, limit: int, masked_head: bool) -> None:
    model = make_model(torch.float64, logit_shift=1)
    settings = [{}, dict(block_size=1, denoising_steps=1), dict(block_size=8, denoising_steps=5), dict(temperature=0.0)]
    wanted = [
        dataclasses.replace(request, sampling=dataclasses.replace(SAMPLING, **settings[number % 4]))
        for number, request in enumerate(requests(SAMPLING, 18))
    ]
    wanted += [dataclasses.replace(request, sample=1, stream=request.stream + 1) for request in wanted]
    options = EngineOptions(6, 40, limit, page_size=page_size, masked_head=masked_head)
    found = by_key(Engine(model, vocabulary(), options).run(wanted))
    for request in wanted:
        is_naive(found[request.prompt_key, request.sample], naive.generate(model, request))
