"""Log-probabilities of given responses: against the engine, against naive forward passes, and in other rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dlm.config.errors import CheckpointError, DataError
from megatron_dlm.data.jsonl import write_jsonl
from megatron_dlm.data.traces import Limits, TraceLine, read_traces, trace_record
from megatron_dlm.diffusion.layout import Grid
from megatron_dlm.evaluation import score as score_module
from megatron_dlm.evaluation.score import compare, row_budget, score, scored_records, summarize, table
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_group, random_trace, states
from tests.evaluation.test_generate import (
    LAYOUTS,
    SAMPLING,
    generate_file,
    open_model,
    parallel_model,
    prompt_lists,
    save_start,
    write_prompts,
)
from tests.harness import pool
from tests.rollout.test_engine import WAYS
from tests.tiny import allowed_logprobs, explicit_logits, make_model, quiet

LIMITS = Limits(PAD_ID + 1, MASK_ID, 256)


def score_lines(session, state, lines: list[TraceLine], budget: int | None = None):
    return score(session, state, lines, row_budget(lines, budget), quiet())


def read(path: Path, **settings) -> list[TraceLine]:
    return read_traces(str(path), LIMITS, default_block_size=4, **settings)


@pytest.fixture(scope="module", params=["fp32", "fp64"])
def scored_ways(request, tmp_path_factory):
    """Responses of every way to sample, in one file of several block sizes and temperatures, and its scores."""
    folder = tmp_path_factory.mktemp("ways")
    session, state = open_model(fp64=request.param == "fp64")
    prompts, records, ways = write_prompts(folder / "prompts.jsonl", prompt_lists()), [], []
    for way, changes in WAYS.items():
        made = generate_file(session, state, prompts, dataclasses.replace(SAMPLING, **changes))
        records, ways = records + made, ways + [way] * len(made)
    write_jsonl(folder / "responses.jsonl", records)
    lines = read(folder / "responses.jsonl")
    return {"fp32": 1e-4, "fp64": 1e-10}[request.param], ways, lines, score_lines(session, state, lines)


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_the_log_probabilities_of_the_engine(scored_ways, way: str) -> None:
    tolerance, ways, lines, scores = scored_ways
    tokens = 0
    for one, line, (trace, block) in zip(ways, lines, scores, strict=True):
        if one == way:
            np.testing.assert_allclose(trace, line.record["logprobs"], rtol=0, atol=tolerance)
            assert block.shape == trace.shape and np.isfinite(block).all()
            tokens += len(trace)
    assert tokens > 50 or way == "one token"
    mine = [line.record for one, line in zip(ways, lines) if one == way]
    differs = any(record["logprobs"] != record["sampling_logprobs"] for record in mine)
    how = dataclasses.replace(SAMPLING, **WAYS[way])
    assert differs == (how.top_k > 0 or how.top_p < 1 or how.temperature == 0)  # the policy knows no filter


def random_lines(tmp_path: Path, temperatures=(1.0, 0.7, 0.0)) -> list[TraceLine]:
    """Random texts in blocks of 1, 4 and 8, one file; several responses to a prompt, all lengths modulo the block."""
    rng, records = np.random.default_rng(0), []
    for block in (1, 4, 8):
        for n, temperature in enumerate([*temperatures, 1.5]):
            for trace in random_group(1 + 3 * n, [2 + n, 7, 11 - n], block, rng, f"{block}/{n}"):
                trace.sampling = dataclasses.replace(trace.sampling, temperature=temperature)
                records.append(trace_record(trace, len(records), trace.sample, ""))
    write_jsonl(tmp_path / "in.jsonl", records)
    return read(tmp_path / "in.jsonl")


def naive_trace(model, line: TraceLine) -> dict[int, float]:
    """Log-probability of each response token, by a forward pass for every state of the trace."""
    trace, found = line.trace, {}
    for seen in states(trace, Grid(trace.sampling.block_size)):
        found |= _naive(model, line, list(seen.shown), list(seen.decided))
    return found


def naive_block(model, line: TraceLine) -> dict[int, float]:
    """The same with all of a block hidden at once: one forward pass for every block."""
    tokens, first = line.trace.tokens.tolist(), len(line.trace.prompt_ids)
    end, size, found = first + len(line.trace.response_ids), line.trace.sampling.block_size, {}
    for start in range(first // size * size, end, size):
        shown = tokens[: start + size]
        for position in range(max(start, first), len(shown)):
            shown[position] = MASK_ID
        found |= _naive(model, line, shown, [p for p in range(start, start + size) if first <= p < end])
    return found


@torch.no_grad()
def _naive(model, line: TraceLine, shown: list[int], wanted: list[int]) -> dict[int, float]:
    position = torch.arange(len(shown))
    block = position // line.trace.sampling.block_size
    logits = explicit_logits(
        model, torch.tensor(shown), position, block[None, :] <= block[:, None], torch.tensor(wanted)
    )
    policy = allowed_logprobs(logits, line.record["temperature"] or 1.0)
    return {
        place - len(line.trace.prompt_ids): policy[row, line.trace.tokens[place]].item()
        for row, place in enumerate(wanted)
    }


@pytest.fixture(scope="module")
def model():
    return open_model(fp64=True)


def test_both_numbers_are_those_of_naive_forward_passes(model, tmp_path) -> None:
    lines, naive_model = random_lines(tmp_path), make_model()
    different = 0
    for line, (trace, block) in zip(lines, score_lines(*model, lines), strict=True):
        for found, naive in ((trace, naive_trace(naive_model, line)), (block, naive_block(naive_model, line))):
            assert sorted(naive) == list(range(len(found)))
            np.testing.assert_allclose(found, [naive[index] for index in range(len(found))], rtol=0, atol=1e-10)
        different += int((np.abs(trace - block) > 1e-6).sum())
    assert different > 50


@pytest.mark.parametrize("budget", [None, 64, 80, 200])
@pytest.mark.parametrize("at_once", [1, 3, 128])
def test_rows_do_not_matter(model, tmp_path, monkeypatch, budget: int | None, at_once: int) -> None:
    lines = random_lines(tmp_path)
    expected = score_lines(*model, lines)
    monkeypatch.setattr(score_module, "LINES_AT_ONCE", at_once)
    order = np.random.default_rng(2).permutation(len(lines))
    for place, found in zip(order, score_lines(*model, [lines[n] for n in order], budget)):
        for one, other in zip(found, expected[place]):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def score_in(parallel: dict, start: Path, path: Path, budget: int | None):
    session, state = parallel_model(parallel, start)
    return score_lines(session, state, read(path), budget)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_do_not_matter(model, tmp_path, layout: str) -> None:
    """40 lines for two processes, and one line, which leaves a data-parallel rank without work."""
    world, parallel = LAYOUTS[layout]
    lines = random_lines(tmp_path)
    (tmp_path / "one.jsonl").write_text(json.dumps(lines[5].record) + "\n")
    expected = score_lines(*model, lines)
    pool(1).run(save_start, tmp_path / "start")
    for name, budget, wanted in [("in", 120, expected), ("one", None, expected[5:6])]:
        found, *others = pool(world).run(score_in, parallel, tmp_path / "start", tmp_path / f"{name}.jsonl", budget)
        assert len(found) == len(wanted) and all(other == [] for other in others)
        for one, other in zip(found, wanted):
            for here, there in zip(one, other):
                np.testing.assert_allclose(here, there, rtol=0, atol=1e-11)


def test_without_a_tail_that_does_not_matter(model, tmp_path) -> None:
    """A terminal block of one step: the tail may be left out, in both numbers."""
    record = dict(
        prompt_token_ids=[1, 2, 3], token_ids=[4, 5, 6, 7], step_map=[1, 2, 2, 2], tail_token_ids=[8], tail_step_map=[3]
    )
    bare = {name: value for name, value in record.items() if "tail" not in name}
    write_jsonl(tmp_path / "in.jsonl", [record, bare])
    (with_trace, with_block), (trace, block) = score_lines(*model, read(tmp_path / "in.jsonl"))
    np.testing.assert_allclose(trace, with_trace, rtol=0, atol=1e-12)
    np.testing.assert_allclose(block, with_block, rtol=0, atol=1e-12)


def test_steps_count_only_in_their_order(model, tmp_path) -> None:
    record = dict(prompt_token_ids=[1], token_ids=[4, 5, 6, 7, 8, 9, 3], step_map=[1, 2, 1, 3, 4, 3, 5])
    gaps = {**record, "step_map": [2, 9, 2, 30, 40, 30, 77]}
    write_jsonl(tmp_path / "in.jsonl", [record, gaps])
    (one, _), (other, _) = score_lines(*model, read(tmp_path / "in.jsonl"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_empty_prompts_and_responses(model, tmp_path) -> None:
    whole = dict(prompt_token_ids=[], token_ids=[4, 5, 6, 7], step_map=[1, 2, 3, 4])
    write_jsonl(tmp_path / "in.jsonl", [dict(prompt_token_ids=[1], token_ids=[], step_map=[]), whole])
    lines = read(tmp_path / "in.jsonl")
    (nothing, none), (trace, block) = score_lines(*model, lines)
    assert len(nothing) == len(none) == 0 and len(trace) == len(block) == 4
    assert trace[0] == pytest.approx(block[0], abs=1e-12)  # the first step hides the whole block
    assert score_lines(*model, lines[:1])[0][0].shape == (0,)


def test_the_temperature_of_the_flag_beats_that_of_the_line(model, tmp_path) -> None:
    lines = random_lines(tmp_path, temperatures=(1.0, 1.0, 1.0))
    forced = read(tmp_path / "in.jsonl", temperature=0.7)
    for (one, _), (other, _), line in zip(score_lines(*model, lines), score_lines(*model, forced), forced):
        assert line.trace.sampling.policy_temperature == 0.7 and not np.allclose(one, other)


def test_a_line_that_no_row_holds_is_refused(tmp_path) -> None:
    lines = random_lines(tmp_path)
    needed = row_budget(lines, 10_000), row_budget(lines, None)
    assert needed == (10_000, 4096)
    with pytest.raises(DataError, match=r"in.jsonl, line \d+: this response needs a row of \d+ tokens.* 20\. Use at"):
        row_budget(lines, 20)


def test_records_keep_what_they_held(model, tmp_path) -> None:
    write_jsonl(
        tmp_path / "in.jsonl",
        [{"id": "a", "prompt_token_ids": [1], "token_ids": [2, 3, 4], "step_map": [2, 1, 3], "logprobs": [-1, -2, -3]}],
    )
    lines = read(tmp_path / "in.jsonl")
    scores = score_lines(*model, lines)
    (record,) = scored_records(lines, scores)
    assert record.keys() - lines[0].record.keys() == {"trace_logprobs", "block_logprobs", "block_size", "temperature"}
    assert record.items() >= {"id": "a", "token_ids": [2, 3, 4], "block_size": 4, "temperature": 1.0}.items()
    assert record["trace_logprobs"] == scores[0][0].tolist() and record["block_logprobs"] == scores[0][1].tolist()
    broken = [(np.array([0.0, np.nan, 0.0]), scores[0][1])]
    with pytest.raises(CheckpointError, match="in.jsonl, line 1: this model gives a token a log-probability"):
        scored_records(lines, broken)


def test_the_summary_names_the_worst_token(tmp_path) -> None:
    record = {"prompt_token_ids": [1], "token_ids": [2, 3, 4], "step_map": [2, 1, 3]}
    write_jsonl(
        tmp_path / "in.jsonl",
        [record, {**record, "logprobs": [-1, -2, -3]}, {**record, "logprobs": [-1.5, -2, -3.25]}],
    )
    lines, same = read(tmp_path / "in.jsonl"), np.array([-1.0, -2.0, -3.0])
    scores = [(same, 2 * same)] * 3
    found, metrics = compare(lines, scores), summarize(lines, scores)
    assert (found.tokens, found.largest, found.token) == (6, 0.5, 0)
    assert found.mean == pytest.approx(0.125) and found.where.endswith("in.jsonl, line 3")
    assert metrics == {
        "score/lines": 3,
        "score/tokens": 9,
        "score/trace_logprob": -2,
        "score/block_logprob": -4,
        "score/logprob_abs_diff": 0.125,
        "score/logprob_abs_diff_max": 0.5,
    }
    shown = table(metrics, found)
    assert "line 3, entry 0 of its token_ids" in shown and "5.000e-01" in shown
    assert compare(lines[:1], scores[:1]) is None and "|" not in table(summarize(lines[:1], scores[:1]), None)


# Full attention -------------------------------------------------------------------------------------------------------


def read_full(path: Path) -> list[TraceLine]:
    return read_traces(str(path), LIMITS, default_block_size=None)


def score_full(session, state, lines: list[TraceLine], budget: int | None = None):
    return score(session, state, lines, row_budget(lines, budget, full_attention=True), quiet())


@pytest.fixture(scope="module", params=[0, 1], ids=["in place", "logits ahead"])
def full_model(request):
    return open_model(fp64=True, full_attention=True, block_size=None, logit_shift=request.param)


CUTS = {
    "exact": dict(prefix_cache=False),
    "exact, to the horizon": dict(prefix_cache=False, horizon=2, temperature=0.7),
    "one step a block": dict(denoising_steps=1, remasking="static"),
}


def test_under_full_attention_scores_are_the_log_probabilities_of_the_engine(full_model, tmp_path) -> None:
    prompts, records = write_prompts(tmp_path / "prompts.jsonl", prompt_lists(4)), []
    for changes in CUTS.values():
        how = dataclasses.replace(SAMPLING, **{"remasking": "static", "max_new_tokens": 10, **changes})
        records += generate_file(*full_model, prompts, how)
    write_jsonl(tmp_path / "responses.jsonl", records)
    lines = read_full(tmp_path / "responses.jsonl")
    for budget in (None, 64, 33):
        for line, (trace, block) in zip(lines, score_full(*full_model, lines, budget), strict=True):
            np.testing.assert_allclose(trace, line.record["logprobs"], rtol=0, atol=1e-10)
            if line.record["denoising_steps"] == 1:
                np.testing.assert_allclose(block, trace, rtol=0, atol=1e-10)
    assert any(record["tail_token_ids"] for record in records)


def test_under_full_attention_both_numbers_are_those_of_naive_passes(full_model, tmp_path) -> None:
    rng, records = np.random.default_rng(0), []
    for horizon in (None, 0, 3):
        for n, length in enumerate((2, 7, 8, 11)):
            trace = random_trace(1 + 3 * n, length, 4, rng, full=True, behind=n, horizon=horizon)
            records.append(trace_record(trace, len(records), 0, ""))
    write_jsonl(tmp_path / "in.jsonl", records)
    lines = read_full(tmp_path / "in.jsonl")
    shift = full_model[0].model.logit_shift
    naive_model = make_model(full_attention=True, block_size=None, logit_shift=shift)
    for line, (trace, block) in zip(lines, score_full(*full_model, lines), strict=True):
        prompt, tokens = len(line.trace.prompt_ids), line.trace.tokens.tolist()
        end = prompt + line.record["max_new_tokens"]
        by_trace, by_block = {}, {}
        for seen in states(line.trace, Grid(None)):
            by_trace |= _naive_full(naive_model, line, list(seen.shown), list(seen.decided))
        for start in range(prompt, prompt + len(line.trace.response_ids), 4):
            wanted = [p for p in range(start, start + 4) if p < prompt + len(line.trace.response_ids)]
            by_block |= _naive_full(naive_model, line, tokens[:start] + [MASK_ID] * (end - start), wanted)
        for found, expected in ((trace, by_trace), (block, by_block)):
            np.testing.assert_allclose(found, [expected[n] for n in range(len(found))], rtol=0, atol=1e-10)


@torch.no_grad()
def _naive_full(model, line: TraceLine, shown: list[int], wanted: list[int]) -> dict[int, float]:
    everything = torch.ones(len(shown), len(shown), dtype=torch.bool)
    read = torch.tensor([place - model.logit_shift for place in wanted])
    logits = explicit_logits(model, torch.tensor(shown), torch.arange(len(shown)), everything, read)
    policy = allowed_logprobs(logits, line.record["temperature"] or 1.0)
    return {
        place - len(line.trace.prompt_ids): policy[row, line.trace.tokens[place]].item()
        for row, place in enumerate(wanted)
    }


def test_under_full_attention_a_row_has_to_hold_one_copy(tmp_path) -> None:
    trace = random_trace(5, 9, 4, np.random.default_rng(0), full=True, behind=3)
    write_jsonl(tmp_path / "in.jsonl", [trace_record(trace, 0, 0, "")])
    lines = read_full(tmp_path / "in.jsonl")
    assert row_budget(lines, 20, full_attention=True) == 20
    with pytest.raises(DataError, match="needs a row of 20 tokens for the text and its masks, .* 19. Use at least 20"):
        row_budget(lines, 19, full_attention=True)
