"""Whatever the cache, the budget and the company: the same responses, token for token and step for step."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.rollout import engine as engine_module
from megatron_dlm.rollout.engine import Engine
from megatron_dlm.rollout.options import EngineOptions
from megatron_dlm.rollout.request import Request, rollout_stream
from megatron_dlm.rollout.rounds import Rounds
from tests.rollout.naive import generate
from tests.rollout.test_engine import SAMPLING, WAYS, by_key, same
from tests.tiny import make_model, vocabulary

LENGTH = 64
TOKEN_BYTES = 2 * 2 * 2 * 8 * 8  # layers x (key, value) x heads x width x float64


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float64)


def groups(count: int, samples: int, sampling, longest_prompt: int = 30, seed: int = 0) -> list[Request]:
    """`samples` responses to each of `count` prompts of random lengths."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 50, rng.integers(1, longest_prompt + 1)) for _ in range(count)]
    return [
        Request(prompt, sampling, f"p{number}", sample, rollout_stream(3, 0, f"p{number}", sample))
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def options(**changes) -> EngineOptions:
    return EngineOptions(**{"max_running_requests": 16, "max_length": LENGTH, "page_size": 16} | changes)


def whole(engine: Engine) -> bool:
    """No page is held by anybody once the kept prompts are forgotten."""
    engine.drop_cache()
    pool = engine.scheduler.pool
    return pool.num_free == pool.num_pages and not any(pool.references)


CACHES = {
    "page 1": dict(page_size=1),
    "page 3": dict(page_size=3),
    "page 64": dict(page_size=64),
    "not shared": dict(share_prompts=False),
    "commits alone": dict(fuse_commit=False),
    "head everywhere": dict(masked_head=False),
    "longest first": dict(longest_first=True),
    "chunks of a block": dict(max_tokens_per_pass=8),
    "chunks of 20": dict(max_tokens_per_pass=20, page_size=3),
}
TIGHT = {  # pages, tokens per page: from all for one text, and of little use to others, to room for half of them
    "one text": (5, 16),
    "9 pages of 16": (9, 16),
    "20 pages of 5": (20, 5),
    "30 pages of 4": (30, 4),
    "100 pages of 1": (100, 1),
}


def mixed(count: int, samples: int) -> list[Request]:
    """Groups with prompts of all lengths modulo the block, some ways of sampling among each other."""
    ways = [dataclasses.replace(SAMPLING, **changes) for changes in WAYS.values()]
    wanted = groups(count, samples, SAMPLING)
    return [
        dataclasses.replace(request, sampling=ways[number // samples % len(ways)])
        for number, request in enumerate(wanted)
    ]


ROUNDS = {
    "2 rounds": dict(rounds_per_sync=2),
    "5 rounds, page 3": dict(rounds_per_sync=5, page_size=3),
    "5 rounds, few slots": dict(rounds_per_sync=5, max_running_requests=3),
    "5 rounds, tight": dict(rounds_per_sync=5, page_size=4, kv_cache_bytes=40 * 4 * TOKEN_BYTES),
    "50 rounds": dict(rounds_per_sync=50),
    "forward replayed": dict(rounds_per_sync=3, cuda_graphs=True),
    "replayed": dict(rounds_per_sync=3, cuda_graphs=True, fused_sampler=True),
}


PLACES = [(0, 1), (0, None), (0, 16), (5, None)]  # empty ones, those for finished blocks


@pytest.mark.parametrize(
    "rounds, empty, commits",
    [(name, *places) for name in ROUNDS for places in (PLACES if name != "forward replayed" else PLACES[1:2])],
)
def test_rounds_without_the_host_change_nothing(
    model, rounds: str, empty: int, commits: int | None, monkeypatch
) -> None:
    """However many finished blocks a round has places for, however many places are empty, whatever ends in between."""
    monkeypatch.setattr(engine_module, "Rounds", functools.partial(CountedRounds, empty, commits))
    CountedRounds.made = 0
    if "fused_sampler" in ROUNDS[rounds]:
        without_kernels(monkeypatch)
    wanted = [request for request in mixed(30, 2) if request.sampling.block_size == 4]
    reference = plainly(model, wanted)
    engine = Engine(model, vocabulary(), options(**ROUNDS[rounds]))
    found = by_key(engine.run(wanted))
    assert found.keys() == reference.keys()
    for key, trace in found.items():
        same(trace, reference[key])
    assert CountedRounds.made > 0 and whole(engine)
    assert engine.stats.forwards == sum(trace.num_forwards for trace in found.values())


def without_kernels(monkeypatch) -> None:
    """The fused sampler as far as it is torch's: in float64 that is all but what is kept of a narrow block."""
    monkeypatch.setattr(pytest.importorskip("megatron_dlm.rollout.unmask_triton"), "WIDEST", 0)


class CountedRounds(Rounds):
    made = 0

    def __init__(self, empty: int, commits: int | None, *place) -> None:
        CountedRounds.made += 1
        *place, width = place
        width = (width or len(place[4])) + empty
        super().__init__(*place, width, None if commits is None else min(commits, width))


@pytest.mark.parametrize("whole_rounds", [False, True])
def test_rounds_of_several_block_sizes_are_captured_apart(model, whole_rounds: bool, monkeypatch) -> None:
    """Four sequences of block 8, then eight of block 4: as many tokens in a round, and not the same shape. Then the
    same by other weights: no new shape.
    """
    if whole_rounds:
        without_kernels(monkeypatch)
    settings = [dict(block_size=8, denoising_steps=8), dict(block_size=4), dict(block_size=4)]
    engine = Engine(model, vocabulary(), options(rounds_per_sync=3, cuda_graphs=True, fused_sampler=whole_rounds))
    captured = []
    for version, (changes, count) in enumerate(zip(settings, (4, 8, 8))):
        sampling = dataclasses.replace(SAMPLING, max_new_tokens=12, ignore_eos=True, **changes)
        wanted, engine.weight_version = groups(count, 1, sampling), version
        found, reference = by_key(engine.run(wanted)), plainly(model, wanted)
        for key, trace in found.items():
            same(dataclasses.replace(trace, weight_versions=np.zeros_like(trace.weight_versions)), reference[key])
            assert (trace.weight_versions == version).all()
        captured.append(set(engine.graphs.captured))
    assert captured[0] < captured[1] == captured[2]
    engine.drop_cache()
    assert set(engine.graphs.captured) == captured[2], "weights that were written where they are need no new graphs"
    norm = model.decoder.final_layernorm
    monkeypatch.setattr(norm.weight, "data", norm.weight.data.clone())
    engine.drop_cache()
    assert not engine.graphs.captured, "weights that have moved do"
    engine.run(wanted)
    assert engine.graphs.captured
    engine.sleep()
    assert not engine.graphs.captured


def test_counts_begin_anew(model) -> None:
    engine, wanted = Engine(model, vocabulary(), options()), groups(3, 3, SAMPLING)
    engine.run(wanted)
    first = (engine.stats.shared_tokens, engine.stats.preemptions, engine.stats.finished)
    engine.drop_cache()
    engine.stats.reset()
    engine.run(wanted)
    assert (engine.stats.shared_tokens, engine.stats.preemptions, engine.stats.finished) == first and first[0] > 0


def plainly(model, wanted: list[Request]) -> dict:
    """Nothing shared, nothing scarce."""
    return by_key(Engine(model, vocabulary(), options(share_prompts=False, max_running_requests=64)).run(wanted))


@pytest.mark.parametrize("cache", CACHES)
def test_no_cache_and_no_budget_changes_a_response(model, cache: str) -> None:
    wanted = mixed(40, 3)
    reference = plainly(model, wanted)
    engine = Engine(model, vocabulary(), options(**CACHES[cache]))
    found = by_key(engine.run(wanted))
    assert found.keys() == reference.keys()
    for key, trace in found.items():
        if not engine.options.fuse_commit:
            blocks = (
                -(-len(trace.tokens) // trace.sampling.block_size) - len(trace.prompt_ids) // trace.sampling.block_size
            )
            assert trace.num_forwards == reference[key].num_forwards + blocks - 1  # and one for each commit
            trace.num_forwards = reference[key].num_forwards
        same(trace, reference[key])
    assert (engine.stats.shared_tokens > 0) == engine.options.share_prompts and whole(engine)


@pytest.mark.parametrize("room", TIGHT)
def test_sequences_that_lose_their_pages_go_on_as_if_nothing_was(model, room: str) -> None:
    pages, page_size = TIGHT[room]
    wanted = groups(20, 3, dataclasses.replace(SAMPLING, max_new_tokens=30, ignore_eos=True))
    reference = plainly(model, wanted)
    tight = options(page_size=page_size, kv_cache_bytes=pages * page_size * TOKEN_BYTES, max_tokens_per_pass=60)
    engine = Engine(model, vocabulary(), tight)
    found = by_key(engine.run(wanted))
    assert found.keys() == reference.keys()
    for key, trace in found.items():
        same(trace, reference[key])
    assert engine.stats.preemptions > 0 and whole(engine)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
def test_all_block_sizes_and_prompts_of_every_length_modulo_the_block(model, block: int) -> None:
    """Against the naive loop: one sequence, no cache. The cache is tight, prompts are shared and cut into chunks."""
    sampling = dataclasses.replace(
        SAMPLING, block_size=block, denoising_steps=max(1, block // 2), max_new_tokens=min(block + 3, 20)
    )
    rng, wanted = np.random.default_rng(block), []
    for length in range(1, block + 1):
        prompt = rng.integers(0, 50, length + block * (length % 2))
        for sample in range(2 if block < 32 else 1):
            key = f"p{length}"
            wanted.append(Request(prompt, sampling, key, sample, rollout_stream(1, 0, key, sample)))
    tight = options(max_length=96, page_size=5, max_tokens_per_pass=24, kv_cache_bytes=25 * 5 * TOKEN_BYTES)
    found = by_key(Engine(model, vocabulary(), tight).run(wanted))
    for request in wanted:
        trace, expected = found[request.prompt_key, request.sample], generate(model, request)
        assert trace.response_ids.tolist() == expected.response and trace.tail_ids.tolist() == expected.tail
        assert trace.steps.tolist() == expected.steps and trace.num_forwards == expected.forwards
        np.testing.assert_allclose(trace.logprobs, expected.logprobs, rtol=0, atol=1e-10)


def test_the_prompt_of_a_group_is_computed_once(model) -> None:
    wanted = groups(6, 8, SAMPLING)
    engine = Engine(model, vocabulary(), options(max_running_requests=48))
    engine.run(wanted)
    full = [len(request.prompt_ids) // 4 * 4 for request in wanted]
    assert engine.stats.prefill_tokens == sum(full[::8])
    assert engine.stats.shared_tokens == sum(full) - sum(full[::8])
    alone = Engine(model, vocabulary(), options(max_running_requests=48, share_prompts=False))
    alone.run(wanted)
    assert alone.stats.prefill_tokens == sum(full) and alone.stats.shared_tokens == 0


def test_a_forward_per_denoising_step_and_none_more(model) -> None:
    """No pass that only commits, none for the last block, and none for prompts that ride along."""
    wanted = groups(5, 2, dataclasses.replace(SAMPLING, ignore_eos=True, remasking="static", max_new_tokens=12))
    engine = Engine(model, vocabulary(), options())
    traces = engine.run(wanted)
    assert engine.stats.forwards == engine.stats.denoising_steps == sum(trace.num_steps for trace in traces)
    blocks = [-(-len(trace.tokens) // 4) - len(trace.prompt_ids) // 4 for trace in traces]
    assert engine.stats.commit_tokens == 4 * sum(count - 1 for count in blocks)


def test_the_head_reads_masked_positions_only(model) -> None:
    wanted = groups(5, 2, dataclasses.replace(SAMPLING, ignore_eos=True, remasking="static", max_new_tokens=12))
    engine, everywhere = (Engine(model, vocabulary(), options(masked_head=flag)) for flag in (True, False))
    traces = engine.run(wanted)
    everywhere.run(wanted)
    masked = 0
    for trace in traces:
        block = (len(trace.prompt_ids) + np.arange(len(trace.all_steps))) // 4
        for step in range(1, trace.num_steps + 1):
            current = block[trace.all_steps == step][0]
            masked += int(((block == current) & (trace.all_steps >= step)).sum())
    assert engine.stats.head_tokens == masked
    assert everywhere.stats.head_tokens == 4 * engine.stats.denoising_steps


def test_a_prefix_is_kept_until_the_weights_change(model) -> None:
    first, *others = groups(1, 3, SAMPLING, longest_prompt=30, seed=2)
    assert len(first.prompt_ids) >= 8
    engine = Engine(model, vocabulary(), options())
    for request in (first, *others):
        engine.run([request])
    full = len(first.prompt_ids) // 4 * 4
    assert (engine.stats.prefill_tokens, engine.stats.shared_tokens) == (full, 2 * full)
    with torch.no_grad():
        saved = model.output_layer.weight.clone()
        key = model.decoder.layers[1].self_attention.linear_qkv.weight
        before = key.clone()
        key.neg_()
    engine.drop_cache()
    try:
        (trace,) = engine.run([first])
        assert trace.response_ids.tolist() == generate(model, first).response
        assert engine.stats.prefill_tokens == 2 * full
    finally:
        with torch.no_grad():
            key.copy_(before)
            model.output_layer.weight.copy_(saved)


def test_new_weights_in_the_middle_are_used_from_there_on(model) -> None:
    """The cache is dropped while sequences run: what comes then equals a continuation from the same state."""
    wanted = groups(3, 2, dataclasses.replace(SAMPLING, ignore_eos=True))
    engine, other = (Engine(model, vocabulary(), options()) for _ in range(2))
    engine.submit(wanted)
    for _ in range(6):
        engine.step()
    half = engine.abort()
    changed = make_model(torch.float64, seed=1)
    continued = Engine(changed, vocabulary(), options())
    continued.weight_version = 1
    by = {(request.prompt_key, request.sample): request for request in wanted}
    expected = by_key(
        continued.run(dataclasses.replace(by[trace.prompt_key, trace.sample], partial=trace) for trace in half)
    )
    other.submit(half_requests := [dataclasses.replace(by[t.prompt_key, t.sample], partial=t) for t in half])
    other.wake()
    assert len(half_requests) == 6 and other.step() == []  # keys of the old weights are in the cache now
    other.abort()
    other.model, other.weight_version = changed, 1
    other.drop_cache()
    for key, trace in by_key(other.run(half_requests)).items():
        same(trace, expected[key])
        old = len(by[key].partial.response_ids) if by[key].partial else 0
        versions = trace.weight_versions
        begun = next(len(one.response_ids) for one in half if (one.prompt_key, one.sample) == key)
        assert old == 0 and (versions[:begun] == 0).all() and (versions[begun:] == 1).all()


def test_a_dropped_cache_does_not_disturb_who_runs(model) -> None:
    wanted = mixed(12, 3)
    reference, engine, found = plainly(model, wanted), Engine(model, vocabulary(), options(page_size=3)), []
    engine.submit(wanted)
    while not engine.idle:
        found += engine.step()
        if engine.stats.passes % 4 == 0:
            engine.drop_cache()
        if engine.stats.passes % 7 == 0:
            engine.sleep()
            assert engine.kv_cache_bytes == 0
    for key, trace in by_key(found).items():
        same(trace, reference[key])


def test_abort_some(model) -> None:
    wanted = groups(4, 3, dataclasses.replace(SAMPLING, ignore_eos=True))
    reference = plainly(model, wanted)
    engine = Engine(model, vocabulary(), options(max_running_requests=6))
    engine.submit(wanted)
    for _ in range(5):
        assert engine.step() == []
    stopped = engine.abort([("p0", 1), ("p3", 2), ("nobody", 0)])
    assert [(trace.prompt_key, trace.sample, trace.finish_reason) for trace in stopped] == [("p0", 1, "abort")]
    found = by_key(engine.run([]))
    assert found.keys() == reference.keys() - {("p0", 1), ("p3", 2)}
    for key, trace in found.items():
        same(trace, reference[key])
    (waiting,) = Engine(model, vocabulary(), options()).abort() or [None]
    assert waiting is None
    again = dataclasses.replace(wanted[1], partial=stopped[0])
    engine.submit([again])
    assert engine.abort() == [stopped[0]]  # it had not begun again: what it had is not lost


def test_what_cannot_go_on_is_refused(model) -> None:
    engine = Engine(model, vocabulary(), options())
    request = groups(1, 1, SAMPLING)[0]
    (whole_trace,) = engine.run([request])
    with pytest.raises(DataError, match="cannot go on: it ended"):
        engine.submit([dataclasses.replace(request, partial=whole_trace)])
    engine.submit([dataclasses.replace(request, sampling=dataclasses.replace(SAMPLING, ignore_eos=True))])
    for _ in range(7):
        engine.step()
    (half,) = engine.abort()
    wider = dataclasses.replace(SAMPLING, block_size=5, denoising_steps=5)
    with pytest.raises(DataError, match="in blocks of 5: its .* tokens end inside a block"):
        engine.submit([dataclasses.replace(request, partial=half, sampling=wider)])
    assert engine.idle


@pytest.mark.parametrize(
    "changes, words",
    [(dict(max_new_tokens=0), "0 new tokens"), (dict(denoising_steps=5), "5 denoising steps per block of 4")],
)
def test_what_can_never_be_sampled_is_refused(model, changes: dict, words: str) -> None:
    engine = Engine(model, vocabulary(), options())
    with pytest.raises(DataError, match=words):
        engine.submit(groups(1, 1, dataclasses.replace(SAMPLING, **changes)))
    assert engine.idle


def test_a_cache_without_room_for_one_text_is_refused(model) -> None:
    with pytest.raises(ConfigError, match="too small: one text of 64 tokens needs"):
        Engine(model, vocabulary(), options(kv_cache_bytes=4 * 16 * TOKEN_BYTES))
