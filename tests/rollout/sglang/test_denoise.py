"""The decisions of the algorithm against the naive engine: for the same keys, the same tokens, steps, probabilities."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.request import Request, rollout_stream
from megatron_dlm.rollout.sglang.denoise import BlockState, denoise
from megatron_dlm.rollout.sglang.traces import order_for, trace_of
from megatron_dlm.rollout.sglang.wire import Block, Rules
from tests.diffusion.oracles import MASK_ID
from tests.rollout.naive import generate
from tests.tiny import explicit_logits, make_model, vocabulary

SAMPLING = SamplingParams(max_new_tokens=11, stop_token_ids=(5, 6, 7), threshold=0.3)
WAYS = {
    "dynamic": {},
    "temperature, top-p": dict(temperature=0.8, top_p=0.7),
    "top-k, top-p": dict(top_k=5, top_p=0.6, temperature=1.5),
    "greedy": dict(temperature=0.0),
    "static, 3 steps": dict(remasking="static", denoising_steps=3),
    "sequential": dict(remasking="sequential"),
    "entropy bounded": dict(remasking="entropy_bounded", entropy_bound=2.0),
    "margin": dict(confidence="margin"),
    "untempered": dict(confidence="untempered", temperature=1.3),
    "block 8, 5 steps": dict(block_size=8, denoising_steps=5, remasking="static"),
    "one token": dict(max_new_tokens=1),
    "never stops": dict(ignore_eos=True),
}


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float64)


def requests(sampling: SamplingParams, count: int = 9) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(0, 50, 1 + n), sampling, f"p{n}", 0, rollout_stream(1, 0, f"p{n}", 0))
        for n in range(count)
    ]


def logits_of(model, texts: list[list[int]], block: int) -> torch.Tensor:
    """[S * B, V] of the last block of each text, masks standing where they stand."""
    parts = []
    for text in texts:
        position = torch.arange(len(text))
        mask = (position // block)[None, :] <= (position // block)[:, None]
        parts.append(explicit_logits(model, torch.tensor(text), position, mask, position[-block:]).detach())
    return torch.cat(parts)


def rounds(model, orders: list[dict], block: int) -> list[list[Block]]:
    """What a scheduler does with an algorithm: a pass and a step for all, until each block has been seen in its final
    form; stops only where SGLang would.
    """
    texts, states, found = [], [], []
    for order in orders:
        prompt, rules = order["prompt"], Rules.from_wire(order["sampling"]["custom_params"])
        start = len(prompt) // block * block
        texts.append(prompt + [MASK_ID] * (start + block - len(prompt)))
        states.append(BlockState(rules, start, rules.taken, block))
        found.append([])
    live = list(range(len(orders)))
    while live:
        logits = logits_of(model, [texts[n] for n in live], block)
        ids = torch.tensor([texts[n][-block:] for n in live])
        done = denoise(ids, ids == MASK_ID, logits, [states[n] for n in live], vocabulary())
        for n, tokens, finished in zip(list(live), ids.tolist(), done):
            texts[n][-block:] = tokens
            if not finished:
                continue
            found[n].append(states[n].finished(tokens))
            sampling, prompt = orders[n]["sampling"], orders[n]["prompt"]
            new = texts[n][len(prompt) :]
            stopped = not sampling["ignore_eos"] and set(new[: sampling["max_new_tokens"]]) & set(
                sampling["stop_token_ids"]
            )
            if stopped or len(new) >= sampling["max_new_tokens"]:
                live.remove(n)
                continue
            states[n] = BlockState(states[n].rules, len(texts[n]), states[n].steps_taken, block)
            texts[n] += [MASK_ID] * block
    return found


@pytest.mark.parametrize("way", WAYS)
def test_traces_are_those_of_the_naive_engine(model, way: str) -> None:
    sampling = dataclasses.replace(SAMPLING, **WAYS[way])
    wanted = requests(sampling)
    orders = [order_for(request, request.prompt_key) for request in wanted]
    for request, blocks in zip(wanted, rounds(model, orders, sampling.block_size)):
        trace, naive = trace_of(request, blocks, 3, aborted=False), generate(model, request)
        assert trace.response_ids.tolist() == naive.response
        assert trace.tail_ids.tolist() == naive.tail
        assert trace.steps.tolist() == naive.steps
        assert trace.tail_steps.tolist() == naive.tail_steps
        assert trace.finish_reason == naive.reason
        assert trace.num_forwards == naive.forwards + len(blocks)
        np.testing.assert_allclose(trace.logprobs, naive.logprobs, rtol=0, atol=1e-10)
        np.testing.assert_allclose(trace.sampling_logprobs, naive.sampling_logprobs, rtol=0, atol=1e-10)
        assert trace.weight_versions.tolist() == [3] * len(naive.response)


def test_requests_of_many_kinds_share_a_step(model) -> None:
    """Each keeps its own parameters: together they get what they get alone."""
    kinds = [changes for changes in WAYS.values() if "block_size" not in changes]
    wanted = [
        dataclasses.replace(request, sampling=dataclasses.replace(SAMPLING, **changes))
        for request, changes in zip(requests(SAMPLING, len(kinds)), kinds)
    ]
    orders = [order_for(request, request.prompt_key) for request in wanted]
    together = rounds(model, orders, 4)
    for order, blocks in zip(orders, together):
        (alone,) = rounds(model, [order], 4)
        assert [block.ids for block in blocks] == [block.ids for block in alone]
        assert [block.steps for block in blocks] == [block.steps for block in alone]


def test_a_partial_response_goes_on_as_if_never_broken_off(model) -> None:
    request = requests(dataclasses.replace(SAMPLING, ignore_eos=True))[6]
    (blocks,) = rounds(model, [order_for(request, "whole")], 4)
    whole = trace_of(request, blocks, 1, aborted=False)
    broken = trace_of(request, blocks[:2], 1, aborted=True)
    assert broken.finish_reason == "abort" and len(broken.tail_ids) == 0
    assert 0 < len(broken.response_ids) < len(whole.response_ids)
    again = dataclasses.replace(request, partial=broken)
    (rest,) = rounds(model, [order_for(again, "rest")], 4)
    trace = trace_of(again, rest, 2, aborted=False)
    for name in ("response_ids", "tail_ids", "steps", "tail_steps", "logprobs", "sampling_logprobs"):
        assert getattr(trace, name).tolist() == getattr(whole, name).tolist(), name
    assert trace.num_forwards == whole.num_forwards
    new = len(whole.response_ids) - len(broken.response_ids)
    assert trace.weight_versions.tolist() == [1] * len(broken.response_ids) + [2] * new


def test_known_tokens_and_finished_blocks_are_left_alone(model) -> None:
    rules = Rules.of(SAMPLING, 1)
    states = [BlockState(rules, 4, 0, 4), None, BlockState(rules, 8, 5, 4)]
    ids = torch.tensor([[1, MASK_ID, 2, MASK_ID], [9, 8, 7, 6], [3, 3, 3, 3]])
    before = ids.clone()
    done = denoise(ids, ids == MASK_ID, torch.randn(12, 64), states, vocabulary())
    assert done == [False, True, True]
    known = before != MASK_ID
    assert torch.equal(ids[known], before[known])
    assert states[0].in_block == 1 and states[2].in_block == 0
    assert [step > 0 for step in states[0].steps] == ((before != ids) & ~known)[0].tolist()


def test_a_prompt_that_holds_the_mask_token_keeps_it() -> None:
    state = BlockState(Rules.of(SAMPLING, 1), 0, 0, 4)
    ids = torch.tensor([[MASK_ID, 5, MASK_ID, MASK_ID]])
    masked = torch.tensor([[False, False, True, True]])
    for _ in range(4):
        denoise(ids, masked, torch.randn(4, 64), [state], vocabulary())
        masked = masked & (ids == MASK_ID)
    assert ids[0, 0] == MASK_ID and MASK_ID not in ids[0, 1:].tolist()


def test_a_masked_block_without_rules_is_refused() -> None:
    ids = torch.full((1, 4), MASK_ID)
    with pytest.raises(ValueError, match="without its rules"):
        denoise(ids, ids == MASK_ID, torch.randn(4, 64), [None], vocabulary())


@pytest.mark.parametrize("missing, lost", [(0, "blocks at"), (1, "blocks at"), (2, "before its end")])
def test_missing_blocks_are_noticed(model, missing: int, lost: str) -> None:
    request = requests(dataclasses.replace(SAMPLING, ignore_eos=True))[1]
    (blocks,) = rounds(model, [order_for(request, "one")], 4)
    if missing == 2:
        blocks = blocks[:-1]
    else:
        del blocks[missing]
    with pytest.raises(RuntimeError, match=lost):
        trace_of(request, blocks, 1, aborted=False)


def test_rules_survive_the_way() -> None:
    rules = Rules.of(dataclasses.replace(SAMPLING, temperature=0.7, top_p=0.9, remasking="entropy_bounded"), -5, 7)
    assert Rules.from_wire(rules.to_wire()) == rules and rules.confidence == "entropy"
    assert all(isinstance(value, int | float | str) for value in rules.to_wire().values())


def test_the_child_needs_no_megatron() -> None:
    """What SGLang's interpreter imports of this package, with megatron-core and transformers out of reach."""
    script = (
        "import sys\n"
        "for name in ('megatron', 'transformers', 'safetensors', 'yaml', 'einops'): sys.modules[name] = None\n"
        "import megatron_dlm.rollout.sglang.plugin, megatron_dlm.rollout.sglang.server\n"
        "import megatron_dlm.rollout.sglang.backend, megatron_dlm.rollout.sglang.tensors\n"
        "import torch\n"
        "from megatron_dlm.model.policy import Vocabulary\n"
        "from megatron_dlm.rollout.sglang.denoise import *\n"
        "from megatron_dlm.rollout.sglang.wire import Rules\n"
        "rules = Rules(1, 0, 1.0, 0, 1.0, 2, 'static', 0.9, 'sampled', 0.3)\n"
        "ids = torch.full((1, 4), 9)\n"
        "denoise(ids, ids == 9, torch.randn(4, 16), [BlockState(rules, 0, 0, 4)], Vocabulary(10, 9))\n"
        "assert (ids != 9).sum() == 2\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
