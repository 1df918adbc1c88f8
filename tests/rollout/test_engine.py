"""The engine against a naive one, against the trainer, and against itself in other batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_dlm import platform
from megatron_dlm.config.errors import DataError
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.planner import Load, pack
from megatron_dlm.diffusion.rows import build_row
from megatron_dlm.diffusion.sampling import draw
from megatron_dlm.diffusion.trace import SamplingParams, Trace
from megatron_dlm.model.policy import label_logprobs, policy_scores
from megatron_dlm.rollout import denoiser
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.diffusion.oracles import MASK_ID, PAD_ID, trace_item
from tests.rollout.naive import generate
from tests.tiny import explicit_logits, make_model, vocabulary

SAMPLING = SamplingParams(max_new_tokens=11, stop_token_ids=(5, 6, 7), threshold=0.3)
WAYS = {
    "dynamic": {},
    "temperature": dict(temperature=0.8),
    "top-p": dict(top_p=0.8),
    "temperature, top-p": dict(temperature=0.8, top_p=0.7),
    "top-k": dict(top_k=3),
    "top-k, top-p": dict(top_k=5, top_p=0.6, temperature=1.5),
    "greedy": dict(temperature=0.0),
    "static": dict(remasking="static"),
    "static, 2 steps": dict(remasking="static", denoising_steps=2),
    "static, 3 steps": dict(remasking="static", denoising_steps=3),
    "sequential": dict(remasking="sequential"),
    "sequential, 3 steps": dict(remasking="sequential", denoising_steps=3),
    "dynamic, 2 steps": dict(denoising_steps=2, threshold=0.95),
    "one step": dict(denoising_steps=1),
    "block 1": dict(block_size=1, denoising_steps=1),
    "block 8": dict(block_size=8, denoising_steps=8),
    "block 8, 5 steps": dict(block_size=8, denoising_steps=5, remasking="static"),
    "one block and a bit": dict(max_new_tokens=5),
    "one token": dict(max_new_tokens=1),
    "never stops": dict(ignore_eos=True),
    "entropy-bounded": dict(remasking="entropy_bounded", entropy_bound=1.5, block_size=8, denoising_steps=8),
    "entropy-bounded, top-p": dict(remasking="entropy_bounded", top_p=0.6, temperature=0.8, confidence="margin"),
    "by untempered": dict(confidence="untempered", temperature=0.7, top_k=5),
    "by margin": dict(confidence="margin", top_p=0.8, threshold=0.5),
    "by margin, greedy": dict(confidence="margin", temperature=0.0, top_k=1),
    "by entropy": dict(confidence="entropy", threshold=-1.2, block_size=8, denoising_steps=8),
    "by entropy, static": dict(confidence="entropy", remasking="static", top_k=4),
}


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float64)


def requests(count: int, sampling: SamplingParams, longest_prompt: int = 13, samples: int = 1) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = {f"p{n}": rng.integers(0, 50, 1 + n % longest_prompt) for n in range(count // samples)}
    return [
        Request(prompt, sampling, key, sample, rollout_stream(1, 0, key, sample))
        for key, prompt in prompts.items()
        for sample in range(samples)
    ]


def by_key(traces: list[Trace]) -> dict[tuple[str, int], Trace]:
    found = {(trace.prompt_key, trace.sample): trace for trace in traces}
    assert len(found) == len(traces)
    return found


def run(model, wanted: list[Request], slots: int = 16, length: int = 40) -> dict[tuple[str, int], Trace]:
    return by_key(Engine(model, vocabulary(), EngineOptions(slots, length)).run(wanted))


def same(one: Trace, other: Trace, tolerance: float = 1e-12) -> None:
    for name in ("prompt_ids", "response_ids", "tail_ids", "steps", "tail_steps", "weight_versions"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert (one.finish_reason, one.num_forwards) == (other.finish_reason, other.num_forwards)
    for name in ("logprobs", "sampling_logprobs"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_traces_are_those_of_the_naive_engine(model, way: str) -> None:
    sampling = dataclasses.replace(SAMPLING, **WAYS[way])
    wanted = requests(13, sampling)
    found = run(model, wanted, slots=5)
    for request in wanted:
        trace, naive = found[request.prompt_key, request.sample], generate(model, request)
        assert trace.response_ids.tolist() == naive.response
        assert trace.tail_ids.tolist() == naive.tail
        assert trace.steps.tolist() == naive.steps
        assert trace.tail_steps.tolist() == naive.tail_steps
        assert trace.finish_reason == naive.reason
        assert trace.num_forwards == naive.forwards == trace.num_steps
        np.testing.assert_allclose(trace.logprobs, naive.logprobs, rtol=0, atol=1e-10)
        np.testing.assert_allclose(trace.sampling_logprobs, naive.sampling_logprobs, rtol=0, atol=1e-10)
        assert MASK_ID not in trace.tokens and trace.tokens.max() <= PAD_ID


def worst_difference(model, traces: list[Trace], temperature: float) -> tuple[float, int]:
    """Largest |rollout - trainer| over the policy's log-probabilities of all tokens, and their number."""
    block = traces[0].sampling.block_size
    items = [trace_item(trace, Grid(block)) for trace in traces]
    plan = pack([Load(item.group, item.shared_length, item.own_length) for item in items], 512, 1, 16)
    worst, count = 0.0, 0
    with torch.no_grad():
        for members in plan.ranks[0]:
            row = build_row([(index, items[index]) for index in members], plan.length, MASK_ID, PAD_ID).to(
                platform.device()
            )
            trained = (
                label_logprobs(policy_scores(model.forward_row(row), temperature, vocabulary()), row.targets.label)
                .double()
                .cpu()
                .numpy()
            )
            rolled = [traces[r].logprobs[i] for r, i in zip(row.targets.response.tolist(), row.targets.index.tolist())]
            worst, count = max(worst, np.abs(trained - rolled).max()), count + len(rolled)
    return worst, count


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0.8, 1.0), (0.8, 0.9)])
def test_log_probabilities_of_rollout_and_trainer_agree(
    dtype: torch.dtype, tolerance: float, temperature: float, top_p: float, block: int
) -> None:
    """Every token of 300 responses, three to a prompt. The trainer sees packed rows, the engine a cache."""
    sampling = dataclasses.replace(
        SAMPLING, temperature=temperature, top_p=top_p, block_size=block, denoising_steps=block, max_new_tokens=14
    )
    wanted = requests(300, sampling, samples=3)
    traces = list(run(make_model(dtype), wanted, slots=100, length=40).values())
    worst, count = worst_difference(make_model(dtype), traces, temperature)
    assert count == sum(len(trace.response_ids) for trace in traces) > 1000
    assert worst < tolerance
    assert len({tuple(trace.response_ids) for trace in traces}) > 200, "responses must differ"


@pytest.mark.parametrize("way", ["static", "dynamic", "temperature", "greedy"])
def test_in_float32_only_what_hangs_by_a_hair_differs(way: str) -> None:
    """Another batch rounds otherwise. Where a response first differs from the naive one, that step was within 1e-4 of
    another outcome.
    """
    model = make_model(torch.float32)
    wanted = requests(60, dataclasses.replace(SAMPLING, **WAYS[way]))
    settings = [dict(), dict(max_tokens_per_pass=20, page_size=3), dict(max_running_requests=3, fuse_commit=False)]
    engines = [
        Engine(model, vocabulary(), EngineOptions(**{"max_running_requests": 64, "max_length": 40} | one))
        for one in settings
    ]
    runs = [by_key(engine.run(wanted)) for engine in engines]
    same_ones = 0
    for request in wanted:
        naive = generate(model, request)
        theirs = list(zip(naive.response + naive.tail, naive.steps + naive.tail_steps))
        for found in runs:
            trace = found[request.prompt_key, request.sample]
            ours = list(zip([*trace.response_ids.tolist(), *trace.tail_ids.tolist()], trace.all_steps.tolist()))
            differing = [min(a[1], b[1]) for a, b in zip(ours, theirs) if a != b]
            assert not differing or naive.margins[min(differing) - 1] < 1e-4
            assert differing or ours == theirs
            same_ones += not differing
    assert same_ones > 0.95 * len(wanted) * len(runs)


@pytest.mark.parametrize("shape", [dict(), dict(logit_shift=1), dict(full_attention=True, block_size=None)], ids=str)
def test_logits_of_every_denoising_step_are_those_of_a_dense_mask(shape: dict, monkeypatch) -> None:
    """In float32: what the engine draws from, against one pass over the whole text under an explicit mask."""
    model, full = make_model(torch.float32, **shape), "full_attention" in shape
    engine = Engine(model, vocabulary(), EngineOptions(7, 40, page_size=5, max_tokens_per_pass=60, full_attention=full))
    batch, seen = engine.batch, 0

    def compare(logits, where, position) -> None:
        nonlocal seen
        for row, (slot, place) in enumerate(zip(where.tolist(), position.tolist())):
            end = int(batch.text_end[slot]) if full else int(batch.block_end[slot])
            blocks = torch.arange(end) // (end if full else int(batch.block_size[slot]))
            mask, read = blocks[None, :] <= blocks[:, None], torch.tensor([place - model.logit_shift])
            with torch.no_grad():
                (expected,) = explicit_logits(model, batch.tokens[slot, :end], torch.arange(end), mask, read)
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-4)
            seen += 1

    draw_some = engine.denoiser.draw
    monkeypatch.setattr(engine.denoiser, "draw", lambda *what: compare(*what) or draw_some(*what))
    sampling = dataclasses.replace(SAMPLING, remasking="static", prefix_cache=False)
    wanted = requests(8, sampling, samples=2)
    wider = dict(block_size=8, denoising_steps=5)
    wanted += [
        dataclasses.replace(one, sampling=dataclasses.replace(sampling, **wider), sample=9) for one in wanted[:3]
    ]
    traces = engine.run([one for index, one in enumerate(wanted) if one.sample != 9 or index % 2])
    assert seen > 200 and traces


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_results_do_not_depend_on_the_batch(model, slots: int) -> None:
    """Requests with different parameters, in another order, in other batches."""
    rng, wanted = np.random.default_rng(1), []
    for n, changes in enumerate(list(WAYS.values()) * 2):
        sampling = dataclasses.replace(SAMPLING, **changes)
        wanted.append(Request(rng.integers(0, 50, 1 + n % 9), sampling, f"p{n}", 0, rollout_stream(1, 0, f"p{n}", 0)))
    reference = run(model, wanted, slots=len(wanted))
    other = run(
        model, [wanted[index] for index in rng.permutation(len(wanted))], slots=slots, length=24 if slots == 3 else 33
    )
    assert reference.keys() == other.keys()
    for key in reference:
        same(other[key], reference[key])


@pytest.mark.parametrize("limit", [1, 9, 30, 60, 8192])
def test_results_do_not_depend_on_the_token_limit_of_a_pass(model, limit: int, monkeypatch) -> None:
    wanted = requests(26, dataclasses.replace(SAMPLING, ignore_eos=True))
    reference, passes = run(model, wanted), []
    engine = Engine(model, vocabulary(), EngineOptions(8, 24, max_tokens_per_pass=limit))
    forward = model.forward_tokens

    def counting(tokens, params):
        passes.append((len(tokens), len(params.attention.queries.count)))
        return forward(tokens, params)

    monkeypatch.setattr(model, "forward_tokens", counting)
    found = by_key(engine.run(wanted))
    assert found.keys() == reference.keys()
    for key in reference:
        same(found[key], reference[key])
    assert all(tokens <= limit or sequences == 1 for tokens, sequences in passes)
    assert any(sequences > 1 for _, sequences in passes) == (limit > 1)
    assert engine.stats.forwards == sum(trace.num_forwards for trace in found.values())
    if limit == 1:  # one block of a prompt, or one denoising step, at a time
        chunks = sum(max(0, len(request.prompt_ids) // 4 - 1) for request in wanted)
        assert len(passes) == engine.stats.forwards + chunks


def test_sequences_that_wait_take_turns(model) -> None:
    """No sequence takes a second step before all have taken their first."""
    engine = Engine(model, vocabulary(), EngineOptions(6, 24, max_tokens_per_pass=30))
    engine.submit(requests(6, dataclasses.replace(SAMPLING, ignore_eos=True)))
    seen = []
    for _ in range(9):
        engine.step()
        seen.append(engine.batch.forwards[:6].tolist())
    assert all(max(counts) - min(counts) <= 1 for counts in seen) and min(seen[-1]) > 1


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("way", ["temperature, top-p", "greedy"])
def test_drawing_in_parts_changes_nothing(model, rows: int, way: str, monkeypatch) -> None:
    wanted = requests(20, dataclasses.replace(SAMPLING, **WAYS[way]))
    reference, sizes = run(model, wanted), []
    monkeypatch.setattr(denoiser, "_TABLE_BYTES", rows * 8 * vocabulary().size)
    monkeypatch.setattr(denoiser, "draw", lambda policy, *rest: sizes.append(len(policy)) or draw(policy, *rest))
    found = run(model, wanted)
    assert max(sizes) == rows
    for key in reference:
        same(found[key], reference[key], tolerance=0)


def test_submitting_while_running_changes_nothing(model) -> None:
    wanted = requests(20, SAMPLING)
    engine, traces = Engine(model, vocabulary(), EngineOptions(6, 24)), []
    for index, request in enumerate(wanted):
        engine.submit([request])
        if index % 3 == 0:
            traces += engine.step()
    while not engine.idle:
        traces += engine.step()
    reference = run(model, wanted)
    for key, trace in by_key(traces).items():
        same(trace, reference[key])
    assert engine.step() == [] and len(traces) == 20


def test_samples_of_a_prompt_differ_and_repeat(model) -> None:
    prompt, streams = np.arange(5), [rollout_stream(1, 0, "p", sample) for sample in range(8)]
    wanted = [Request(prompt, SAMPLING, "p", sample, stream) for sample, stream in enumerate(streams)]
    first, again = run(model, wanted), run(model, wanted)
    assert len({tuple(trace.response_ids) for trace in first.values()}) > 4
    for key in first:
        same(first[key], again[key], tolerance=0)


def test_a_stop_token_ends_the_response_and_the_block_is_kept(model) -> None:
    stopped = 0
    for trace in run(model, requests(40, SAMPLING)).values():
        inside = [token in SAMPLING.stop_token_ids for token in trace.response_ids.tolist()]
        assert not any(inside[:-1])
        assert inside[-1] == (trace.finish_reason == "stop")
        assert (len(trace.prompt_ids) + len(trace.response_ids) + len(trace.tail_ids)) % 4 == 0 and len(
            trace.tail_ids
        ) < 4
        assert len(trace.response_ids) == 11 or trace.finish_reason == "stop"
        stopped += inside[-1]
    assert 5 < stopped < 40


def test_steps_count_from_one_without_gaps(model) -> None:
    for trace in run(model, requests(20, SAMPLING)).values():
        assert sorted(set(trace.all_steps.tolist())) == list(range(1, trace.num_steps + 1))


def test_the_weight_version_is_recorded(model) -> None:
    engine = Engine(model, vocabulary(), EngineOptions(4, 24))
    engine.submit(requests(1, dataclasses.replace(SAMPLING, ignore_eos=True)))
    engine.step()
    engine.weight_version = 3
    (trace,) = engine.run([])
    assert trace.weight_versions[trace.steps == 1].tolist() == [0] * int((trace.steps == 1).sum())
    assert set(trace.weight_versions[trace.steps > 1].tolist()) == {3}


def test_new_weights_are_seen_at_once() -> None:
    model = make_model(torch.float64)
    engine, wanted = Engine(model, vocabulary(), EngineOptions(8, 24)), requests(8, SAMPLING)
    before = by_key(engine.run(wanted))
    with torch.no_grad():
        model.output_layer.weight.neg_()
    after = by_key(engine.run(wanted))
    for request in wanted:
        assert after[request.prompt_key, 0].response_ids.tolist() == generate(model, request).response
    assert any(before[key].response_ids.tolist() != after[key].response_ids.tolist() for key in before)


def test_abort_returns_finished_blocks(model) -> None:
    sampling = dataclasses.replace(SAMPLING, ignore_eos=True)
    wanted = requests(12, sampling)
    engine = Engine(model, vocabulary(), EngineOptions(8, 24))
    engine.submit(wanted)
    for _ in range(5):
        assert engine.step() == []
    aborted = engine.abort()
    assert engine.idle and len(aborted) == 8
    whole = run(model, wanted)
    for trace in aborted:
        complete = whole[trace.prompt_key, trace.sample]
        length = len(trace.response_ids)
        assert trace.finish_reason == "abort" and len(trace.tail_ids) == 0 and MASK_ID not in trace.tokens
        assert length == 0 or (len(trace.prompt_ids) + length) % 4 == 0
        assert trace.response_ids.tolist() == complete.response_ids[:length].tolist()
        assert trace.steps.tolist() == complete.steps[:length].tolist()
        trace_item(trace, Grid(4))  # and can still be learned from
    assert any(len(trace.response_ids) for trace in aborted)
    for key, trace in by_key(engine.run(wanted)).items():  # nothing of it is left behind
        same(trace, whole[key])


def test_a_request_that_can_never_run_is_refused(model) -> None:
    engine, good = Engine(model, vocabulary(), EngineOptions(4, 16)), requests(3, SAMPLING)
    too_long = Request(np.arange(6), SAMPLING, "long", 0, 0)  # 6 + 11 needs 20
    with pytest.raises(DataError, match="Prompt long has 6 tokens; with 11 new ones it needs 20, more than the 16"):
        engine.submit([*good, too_long])
    assert engine.idle
    with pytest.raises(DataError, match="Prompt empty has no tokens"):
        engine.submit([Request(np.zeros(0, np.int64), SAMPLING, "empty", 0, 0)])


def test_a_request_that_just_fits(model) -> None:
    exact = Request(np.arange(5), dataclasses.replace(SAMPLING, ignore_eos=True), "p", 0, 7)  # 5 + 11 = 16
    (trace,) = Engine(model, vocabulary(), EngineOptions(1, 16)).run([exact])
    assert len(trace.tokens) == 16 and trace.finish_reason == "length"


def test_greedy_takes_the_best_token_everywhere(model) -> None:
    """Temperature 0 spends no randomness: another key gives the same response."""
    sampling = dataclasses.replace(SAMPLING, temperature=0.0)
    prompt = np.arange(6)
    one, other = Engine(model, vocabulary(), EngineOptions(2, 24)).run(
        [Request(prompt, sampling, "p", sample, 1000 * sample + 1) for sample in range(2)]
    )
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.steps, other.steps)
    assert (one.sampling_logprobs == 0).all() and (one.logprobs < 0).any()
