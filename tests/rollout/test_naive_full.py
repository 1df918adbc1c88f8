"""The oracle of decoding under full attention, held to what can be said about it without an engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.keys import uniforms
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.diffusion.oracles import MASK_ID
from tests.rollout import naive_full
from tests.rollout.naive_full import forward, generate
from tests.tiny import allowed_logprobs, explicit_logits, make_model

SAMPLING = SamplingParams(
    max_new_tokens=11, block_size=4, denoising_steps=4, stop_token_ids=(5, 6, 7), threshold=0.3, remasking="static"
)
CUTS = [(True, None), (True, 0), (True, 3), (False, None), (False, 2)]


@pytest.fixture(scope="module", params=[0, 1])
def model(request):
    return make_model(torch.float64, full_attention=True, block_size=None, logit_shift=request.param)


def requests(sampling: SamplingParams, count: int = 6) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(8, 50, 1 + 2 * n), sampling, f"p{n}", 0, rollout_stream(1, 0, f"p{n}", 0))
        for n in range(count)
    ]


def masks(request: Request) -> torch.Tensor:
    """The canvas before the first step."""
    empty = torch.full((request.sampling.max_new_tokens,), MASK_ID)
    return torch.cat([torch.from_numpy(np.asarray(request.prompt_ids)), empty])


@pytest.mark.parametrize("cache, horizon", CUTS)
def test_a_response_is_whole(model, cache: bool, horizon: int | None) -> None:
    reasons = set()
    for request in requests(dataclasses.replace(SAMPLING, prefix_cache=cache, horizon=horizon), 4):
        found = generate(model, request)
        tokens, steps = found.response + found.tail, found.steps + found.tail_steps
        assert MASK_ID not in tokens and None not in tokens and len(steps) == len(tokens)
        assert len(tokens) in (4, 8, 11) and len(found.tail) < 4  # the last block has 3
        assert sorted(steps) == steps or max(steps[:4]) < min(steps[4:])  # blocks follow each other
        assert found.forwards == max(steps) and set(steps) == set(range(1, max(steps) + 1))
        stops = [token in SAMPLING.stop_token_ids for token in found.response]
        assert not any(stops[:-1]) and stops[-1] == (found.reason == "stop")
        assert found.reason == "stop" or len(found.response) == 11
        reasons.add(found.reason)
    assert "length" in reasons


def test_the_first_token_is_that_of_the_empty_canvas(model) -> None:
    """Against one explicit pass over all masks, read at the position before where the model has a shift."""
    for request in requests(SAMPLING):
        found, canvas = generate(model, request), masks(request)
        first = len(request.prompt_ids)
        place = found.steps.index(1)
        everything = torch.ones(len(canvas), len(canvas), dtype=torch.bool)
        slot = torch.tensor([first + place - model.logit_shift])
        with torch.no_grad():
            logits = explicit_logits(model, canvas, torch.arange(len(canvas)), everything, slot)
        policy = allowed_logprobs(logits.cpu())[0]
        u = float(uniforms(request.stream, torch.tensor([first + place]), torch.tensor([0]))[0])
        token = found.response[place]
        before = float(policy[:token].exp().sum())
        assert before <= u < before + float(policy[token].exp())
        assert found.logprobs[place] == pytest.approx(float(policy[token]), abs=1e-10)


def test_the_window_with_remembered_keys_is_the_whole_pass_again(model) -> None:
    """As long as nothing has changed and the window reaches to the end."""
    request = requests(SAMPLING)[2]
    canvas, first = masks(request), len(request.prompt_ids)
    masked, memory = [first, first + 2], {}
    whole = forward(model, canvas, 0, len(canvas), masked, memory)
    again = forward(model, canvas, first - model.logit_shift, len(canvas), masked, dict(memory))
    assert torch.allclose(again, whole, rtol=0, atol=1e-10)
    changed = canvas.clone()
    changed[first + 1] = 3
    fresh = forward(model, changed, 0, len(canvas), masked, {})
    cached = forward(model, changed, first - model.logit_shift, len(canvas), masked, dict(memory))
    assert not torch.allclose(cached, fresh, atol=1e-4)  # the prompt's keys are older than the change
    cut = forward(model, canvas, first - model.logit_shift, first + 4, masked, dict(memory))
    assert not torch.allclose(cut, whole, atol=1e-4)


def test_one_step_per_block_leaves_nothing_to_cache(model) -> None:
    one_step = dataclasses.replace(SAMPLING, denoising_steps=1)
    for request in requests(one_step, 3):
        plain = generate(
            model, dataclasses.replace(request, sampling=dataclasses.replace(one_step, prefix_cache=False))
        )
        for cache, horizon in CUTS:
            other = dataclasses.replace(one_step, prefix_cache=cache, horizon=horizon)
            assert generate(model, dataclasses.replace(request, sampling=other)) == plain


@pytest.mark.parametrize("cache", [True, False])
def test_a_horizon_beyond_the_canvas_is_none(model, cache: bool) -> None:
    sampling = dataclasses.replace(SAMPLING, prefix_cache=cache)
    for request in requests(sampling, 3):
        far = dataclasses.replace(request, sampling=dataclasses.replace(sampling, horizon=7))
        assert generate(model, far) == generate(model, request)


def test_cache_and_horizon_change_responses(model) -> None:
    """Otherwise an engine that ignores them would pass."""
    for request in requests(dataclasses.replace(SAMPLING, ignore_eos=True), 2):
        settings = [dict(prefix_cache=cache, horizon=horizon) for cache, horizon in CUTS]
        found = [
            generate(model, dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **changes)))
            for changes in settings
        ]
        assert len({tuple(np.round(one.logprobs, 6)) for one in found}) == len(CUTS)


def test_passes_are_what_the_windows_say(model, monkeypatch) -> None:
    """Positions that each pass computes: prompt of 3, blocks of 4 at 3, 7 and 11, canvas of 14."""
    request, passes = requests(SAMPLING)[1], []
    assert len(request.prompt_ids) == 3
    monkeypatch.setattr(
        naive_full,
        "forward",
        lambda model, shown, start, end, masked, memory: (
            passes.append((start, end)) or forward(model, shown, start, end, masked, memory)
        ),
    )
    back = model.logit_shift

    def run(**changes: object) -> list[tuple[int, int]]:
        passes.clear()
        generate(model, dataclasses.replace(request, sampling=dataclasses.replace(sampling, **changes)))
        return list(passes)

    sampling = dataclasses.replace(SAMPLING, denoising_steps=2, ignore_eos=True)
    whole = (0, 14)
    assert run() == [whole, (3 - back, 14), whole, (7 - back, 14), whole, (11 - back, 14)]
    assert run(horizon=2) == [whole, (3 - back, 9), whole, (7 - back, 13), whole, (11 - back, 14)]
    assert run(prefix_cache=False, horizon=0) == [whole, (0, 7), whole, (0, 11), whole, (0, 14)]
    assert run(prefix_cache=False) == [whole] * 6
