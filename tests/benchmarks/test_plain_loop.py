"""The plain loop against the engine's slow oracle, and its model against ours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import plain_loop
from benchmarks.rollout_cases import decoding_of, keyed_uniform, shape_of
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.rollout.naive import generate
from tests.tiny import explicit_logits, make_model

LONGEST = 40
SAMPLING = SamplingParams(max_new_tokens=11, stop_token_ids=(5, 6, 7), threshold=0.3)
WAYS = {
    "greedy": dict(temperature=0.0),
    "greedy, static": dict(temperature=0.0, remasking="static", denoising_steps=3),
    "sampled": {},
    "sampled, static": dict(remasking="static"),
    "two steps": dict(denoising_steps=2, threshold=0.95, temperature=0.8),
    "top-k": dict(top_k=3),
    "top-p": dict(top_p=0.7),
    "top-k, top-p": dict(top_k=5, top_p=0.6, temperature=1.5),
    "block 8": dict(block_size=8, denoising_steps=5),
    "never stops": dict(ignore_eos=True),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request):
    ours = make_model(torch.float64, untie_embeddings_and_output_weights=not request.param)
    shape = shape_of(ours, PAD_ID + 1)
    assert shape.tied == request.param
    return ours, plain_loop.plain_model(dict(ours.named_parameters()), shape, LONGEST)


@pytest.mark.parametrize("length", [4, 12])
def test_logits_of_a_prefilled_text_are_those_of_our_model(models, length: int) -> None:
    ours, plain = models
    tokens = torch.from_numpy(np.random.default_rng(length).integers(0, MASK_ID, length + 4))
    position, blocks = torch.arange(length + 4), torch.arange(length + 4) // 4
    seen = blocks[None, :] <= blocks[:, None]
    with torch.no_grad():
        expected = explicit_logits(ours, tokens, position, seen, position)[:, : PAD_ID + 1].cpu()
        cache = plain.new_cache()
        prefilled = plain.logits(plain(tokens[:length], cache, 0, seen[:length, :length]))
        block = plain.logits(plain(tokens[length:], cache, length))
    torch.testing.assert_close(torch.cat([prefilled, block]), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_it_draws_the_tokens_of_the_oracle_at_the_same_steps(models, way: str) -> None:
    ours, plain = models
    sampling = dataclasses.replace(SAMPLING, **WAYS[way])
    rng = np.random.default_rng(0)
    for length in (1, 3, 4, 9, 16):
        prompt = rng.integers(0, MASK_ID, length)
        stream = rollout_stream(1, 0, "p", length)
        expected = generate(ours, Request(prompt, sampling, "p", length, stream))
        found = plain_loop.generate(plain, prompt.tolist(), decoding_of(sampling, MASK_ID), keyed_uniform(stream))
        assert found.tokens == expected.response + expected.tail
        assert found.steps == expected.steps + expected.tail_steps
        assert found.length == len(expected.response)
        assert found.denoising == expected.forwards
        blocks = -(-(length + len(found.tokens)) // sampling.block_size) - length // sampling.block_size
        assert found.commits == blocks - 1


def test_torchs_own_numbers_serve_where_none_are_given(models) -> None:
    plain = models[1]
    decoding = plain_loop.Decoding(MASK_ID, 9)
    torch.manual_seed(0)
    one = plain_loop.generate(plain, [1, 2, 3], decoding)
    other = plain_loop.generate(plain, [1, 2, 3], decoding)
    assert one.tokens != other.tokens and MASK_ID not in one.tokens + other.tokens
    torch.manual_seed(0)
    assert plain_loop.generate(plain, [1, 2, 3], decoding) == one


def test_a_model_with_other_parts_is_refused() -> None:
    ours = make_model(torch.float64, add_qkv_bias=True)
    with pytest.raises(ValueError, match="linear_qkv.bias"):
        plain_loop.weights_of(dict(ours.named_parameters()), shape_of(ours, PAD_ID + 1))
