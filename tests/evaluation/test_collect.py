"""Step maps of given responses: against a naive loop, against `score`, and in other rows and layouts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dlm.config.errors import CheckpointError, DataError
from megatron_dlm.data.jsonl import write_jsonl
from megatron_dlm.data.traces import Limits, read_traces
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.diffusion.trace import Trace
from megatron_dlm.evaluation.collect import Unmasking, Way, _deal, collect
from megatron_dlm.evaluation.given import (
    Given,
    add_totals,
    describe,
    given_record,
    ids_digest,
    read_given,
    row_budget,
    summarize,
)
from megatron_dlm.evaluation.score import row_budget as score_budget
from megatron_dlm.evaluation.score import score
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.evaluation.test_generate import open_model
from tests.harness import pool
from tests.tiny import EOS_ID, Words, allowed_logprobs, explicit_logits, make_model, quiet


def texts(count: int = 9, least: int = 1) -> list[dict]:
    """Prompts of every length modulo 8, the second twice, and responses of 1 to 13 tokens without their stop token."""
    rng = np.random.default_rng(0)
    words = lambda length: " ".join(map(str, rng.integers(0, 49, length)))
    made = [{"prompt": words(least + n), "response": words((5 * n + 3) % 13 + 1), "id": n} for n in range(count)]
    return [*made, {"prompt": made[1]["prompt"], "response": "7 7 7", "id": count}]


def read(path: Path, grid: Grid, max_length: int = 256) -> list[Given]:
    return read_given(str(path), Words(), "{question}", False, grid, max_length)


def lines_of(path: Path, grid: Grid, records: list[dict]) -> list[Given]:
    write_jsonl(path, records)
    return read(path, grid)


def collected(session, state, lines: list[Given], way: Way, budget: int | None = None, at_once: int = 128):
    found: list[Trace] = []
    collect(session, state, lines, way, row_budget(lines, budget, way.grid), at_once, found.extend)
    return found


def same(found: list[Trace], expected: list[Trace]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.tokens.tolist() == other.tokens.tolist() and one.all_steps.tolist() == other.all_steps.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-11)


# The naive loop -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive(model, given: Given, size: int, per_step: int, full: bool) -> tuple[list[int], list[float]]:
    """Steps and log-probabilities of response and tail, a dense forward pass for every step of every block."""
    prompt, tokens = len(given.prompt_ids), [*given.prompt_ids, *given.response_ids, *given.tail_ids]
    tokens, origin, step = [int(token) for token in tokens], prompt if full else 0, 0
    steps, logprobs = {}, {}
    start = prompt
    while start < len(tokens):
        end = min(origin + ((start - origin) // size + 1) * size, len(tokens))
        hidden = list(range(start, end))
        while hidden:
            step += 1
            shown = tokens[:start] + [MASK_ID if place in hidden else tokens[place] for place in range(start, end)]
            if full:
                shown += [MASK_ID] * (max(len(tokens), prompt + given.canvas) - end)
            block = torch.zeros(len(shown)) if full else torch.arange(len(shown)) // size
            sees = block[None, :] <= block[:, None]
            slots = torch.tensor([max(place - model.logit_shift, 0) for place in hidden])
            logits = explicit_logits(model, torch.tensor(shown), torch.arange(len(shown)), sees, slots)
            policy = allowed_logprobs(logits)
            truth = {place: policy[row, tokens[place]].item() for row, place in enumerate(hidden)}
            for place in sorted(hidden, key=lambda place: (-truth[place], place))[:per_step]:
                steps[place], logprobs[place] = step, truth[place]
                hidden.remove(place)
        start = end
    places = range(prompt, len(tokens))
    return [steps[place] for place in places], [logprobs[place] for place in places]


def assert_naive(model, lines: list[Given], found: list[Trace], way: Way) -> None:
    for given, trace in zip(lines, found, strict=True):
        steps, logprobs = naive(model, given, way.block_size, way.per_step, way.full_attention)
        assert trace.all_steps.tolist()[: len(steps)] == steps
        assert all(step > max(steps, default=0) for step in trace.all_steps[len(steps) :])  # of a canvas: never shown
        np.testing.assert_allclose(trace.logprobs, logprobs[: len(trace.steps)], rtol=0, atol=1e-10)


@pytest.mark.parametrize("size, per_step", [(1, 1), (4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)])
def test_step_maps_are_those_of_the_naive_loop(tmp_path, size: int, per_step: int) -> None:
    changes = dict(block_size=size, logit_shift=int(per_step == 3))
    session, state = open_model(fp64=True, **changes)
    way = Way(session.grid, size, per_step)
    records = [*texts(), {"text": "4 8 15 16 23"}]
    lines = lines_of(tmp_path / "in.jsonl", way.grid, records)
    found = collected(session, state, lines, way)
    assert_naive(make_model(**changes), lines, found, way)
    # Not the order of the text
    assert size == 1 or sum((np.diff(trace.steps) < 0).sum() for trace in found) > 8


@pytest.mark.parametrize("size, per_step, shift, canvas", [(4, 1, 0, 0), (4, 3, 1, 0), (32, 2, 0, 0), (4, 2, 0, 13)])
def test_under_full_attention_too(tmp_path, size: int, per_step: int, shift: int, canvas: int) -> None:
    changes = dict(full_attention=True, block_size=None, logit_shift=shift)
    session, state = open_model(fp64=True, **changes)
    way = Way(session.grid, size, per_step)
    lines = [dataclasses.replace(given, canvas=canvas) for given in lines_of(tmp_path / "in.jsonl", way.grid, texts())]
    assert not any(len(given.tail_ids) for given in lines)
    assert_naive(make_model(**changes), lines, collected(session, state, lines, way, 64), way)


def test_of_equal_tokens_the_first_comes_first() -> None:
    given = Given("", {}, np.arange(3), np.arange(6), np.array([PAD_ID] * 3))
    work = Unmasking(given, Way(Grid(4), 4, 2))
    work.unmask(np.array([8, 0, 2, 1, 5, 4, 3, 6, 7]), np.full(9, -1.0))
    assert work.step.tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 0]
    work.unmask(np.array([3, 4, 7, 8]), np.array([-2.0, -1.0, -1.0, -1.0]))
    assert work.is_done and work.steps().tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert work.logprob.tolist() == [-1, -1, -1, -2, -1, -1, -1, -1, -1]


# Rows, processes and score --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return open_model(fp64=True)


@pytest.mark.parametrize("full, canvas", [(False, 0), (True, 0), (True, 20)])
def test_score_finds_what_was_recorded(tmp_path, full: bool, canvas: int) -> None:
    session, state = open_model(fp64=True, full_attention=full or None, block_size=None if full else 4)
    way = Way(session.grid, 4, 2)
    lines = [dataclasses.replace(one, canvas=canvas) for one in lines_of(tmp_path / "in.jsonl", way.grid, texts())]
    traces = collected(session, state, lines, way)
    records = [given_record(given, trace, 2, Words()) for given, trace in zip(lines, traces)]
    write_jsonl(tmp_path / "out.jsonl", records)
    limits = Limits(PAD_ID + 1, MASK_ID, 256)
    again = read_traces(str(tmp_path / "out.jsonl"), limits, None if full else 4)
    scores = score(session, state, again, score_budget(again, None, full), quiet())
    for record, (trace, _) in zip(records, scores, strict=True):
        np.testing.assert_allclose(record["logprobs"], trace, rtol=0, atol=1e-10)
    # And it is read like any file to fine-tune on, token ids first
    for one, other in zip(read(tmp_path / "out.jsonl", way.grid), lines):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist()


@pytest.mark.parametrize("budget, at_once", [(24, 128), (64, 1), (None, 3)])
def test_rows_do_not_matter(model, tmp_path, budget: int | None, at_once: int) -> None:
    """Also where a response with its copies fits no row."""
    way = Way(model[0].grid, 4, 1)
    lines = lines_of(tmp_path / "in.jsonl", way.grid, texts())
    same(collected(*model, lines, way, budget, at_once), collected(*model, lines, way))


LAYOUTS = {
    "dp2": dict(),
    "tp2 sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2, two virtual stages": dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
}
DEEP = dict(fp64=True, num_layers=4)


def deep_model(parallel: dict, start: Path):
    """A model of four layers in some layout, its weights from a checkpoint."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import model_config, vocabulary

    settings = ParallelConfig(**parallel)
    session = Session(model_config(**DEEP), settings, Words(), initialize(settings, seed=1), vocabulary())
    state = session.train_state(None, 1)
    load(state, start, with_optimizer=False)
    return session, state


def save_deep(start: Path) -> None:
    from megatron_dlm.checkpoint.distributed import save

    _, state = open_model(**DEEP)
    save(state, start, 0, {}, with_optimizer=False)


def collect_in(parallel: dict, start: Path, path: Path, at_once: int) -> list[Trace]:
    session, state = deep_model(parallel, start)
    way = Way(session.grid, 4, 1)
    return collected(session, state, read(path, way.grid), way, 100, at_once)


def test_processes_do_not_matter(tmp_path) -> None:
    """Parts of several lines for each process, of which the last part leaves one without work."""
    write_jsonl(tmp_path / "in.jsonl", texts(8))  # nine lines
    pool(1).run(save_deep, tmp_path / "start")
    (expected,) = pool(1).run(collect_in, {}, tmp_path / "start", tmp_path / "in.jsonl", 128)
    for parallel in LAYOUTS.values():
        found, other = pool(2).run(collect_in, parallel, tmp_path / "start", tmp_path / "in.jsonl", 2)
        assert not other
        same(found, expected)


def test_lines_are_dealt_by_what_they_cost() -> None:
    assert _deal([1, 5, 2, 2, 1, 1], 2) == [[1, 4], [0, 2, 3, 5]]
    assert _deal([3], 3) == [[0], [], []] and _deal([], 2) == [[], []]


# Lines ----------------------------------------------------------------------------------------------------------------


def test_a_record_is_the_line_with_its_trace(model, tmp_path) -> None:
    way = Way(model[0].grid, 4, 3)
    extra = {"index": "mine", "horizon": 3, "temperature": 0.5, "step_map": None, "text": "old"}
    records = [{"prompt": "1 2 3", "response": "4 5", **extra}, {"prompt_token_ids": [1, 2], "token_ids": [3, 4, 5]}]
    lines = lines_of(tmp_path / "in.jsonl", way.grid, records)
    traces = collected(*model, lines, way)
    one, other = (given_record(given, trace, 3, Words()) for given, trace in zip(lines, traces))
    assert one.items() >= {"prompt": "1 2 3", "response": "4 5", "index": "mine", "text": "4 5"}.items()
    assert (one["prompt_token_ids"], one["token_ids"]) == ([1, 2, 3], [4, 5, EOS_ID])
    assert (one["tail_token_ids"], one["block_size"], one["tokens_per_step"]) == ([PAD_ID] * 2, 4, 3)
    assert one["horizon"] is None and one["temperature"] == 1.0 and one["denoising_steps"] == 2
    assert one["step_map"] == traces[0].steps.tolist() and one["tail_step_map"] == traces[0].tail_steps.tolist()
    assert (one["finish_reason"], other["finish_reason"]) == ("stop", "length") and "sample" not in other
    assert json.loads(json.dumps(one)) == one
    broken = dataclasses.replace(traces[0], logprobs=np.array([0.0, np.nan, 0.0]))
    with pytest.raises(CheckpointError, match="line 1: this model gives a token"):
        given_record(lines[0], broken, 3, Words())


def test_lines_that_cannot_be_used_are_refused_by_their_place(tmp_path) -> None:
    path = tmp_path / "in.jsonl"
    for record, says in (
        ({"prompt": "1"}, "line 2: the field 'response' is missing"),
        ({"prompt": "1 2 3 4", "response": "1 2 3 4"}, "line 2: this text has 12 tokens with its last block.* 11"),
        ({"prompt_token_ids": [1], "token_ids": [MASK_ID]}, "line 2: entry 0 of 'token_ids' is the mask token"),
    ):
        write_jsonl(path, [{"prompt": "1", "response": "2"}, record])
        with pytest.raises(DataError, match=says):
            read(path, Grid(4), 11)
    write_jsonl(path, [{"prompt": "1 2 3 4", "response": "1 2 3 4"}])
    assert read(path, Grid(None), 9)[0].length == 9
    with pytest.raises(DataError, match="has 9 tokens, and the model has 8 positions"):
        read(path, Grid(None), 8)


def test_a_row_has_to_hold_one_copy(tmp_path) -> None:
    lines = lines_of(tmp_path / "in.jsonl", Grid(4), texts(3))
    longest = max(given.length for given in lines)
    assert (row_budget(lines, None, Grid(4)), row_budget(lines, longest, Grid(4))) == (4096, longest)
    with pytest.raises(
        DataError, match=rf"a row of {longest} tokens, more than .* {longest - 1}. Use at least {longest}"
    ):
        row_budget(lines, longest - 1, Grid(4))
    long = dataclasses.replace(lines[0], response_ids=np.zeros(8191, np.int64), tail_ids=np.zeros(0, np.int64))
    assert row_budget([long], None, Grid(4)) == 2 * 8192  # the text, and a copy of each block
    assert row_budget([long], None, Grid(None)) == 8192


def test_sums_over_parts_are_those_of_the_whole(model, tmp_path) -> None:
    way = Way(model[0].grid, 4, 2)
    lines = lines_of(tmp_path / "in.jsonl", way.grid, texts())
    traces = collected(*model, lines, way)
    parts = add_totals(add_totals({}, traces[:3]), traces[3:])
    metrics = summarize(parts)
    assert metrics["trace/lines"] == 10 and metrics["trace/tokens"] == sum(len(given.response_ids) for given in lines)
    steps = sum(len(set(trace.steps.tolist())) for trace in traces)
    assert metrics["trace/tokens_per_step"] == metrics["trace/tokens"] / steps
    assert metrics["trace/logprob"] == pytest.approx(np.concatenate([trace.logprobs for trace in traces]).mean())
    assert describe(metrics, "x.jsonl").startswith("10 step maps in x.jsonl: ")
    assert ids_digest(lines) != ids_digest(lines[1:]) and ids_digest(lines) == ids_digest([*lines])
