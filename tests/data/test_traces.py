"""Traces in files: what is written is read back, and what cannot be used is refused by file and line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import write_jsonl
from megatron_dlm.data.traces import Limits, read_traces, trace_record
from megatron_dlm.diffusion.trace import SamplingParams
from tests.diffusion.oracles import MASK_ID, PAD_ID, random_trace

LIMITS = Limits(vocab_size=PAD_ID + 1, mask_id=MASK_ID, max_length=64)
GOOD = {
    "prompt_token_ids": [1, 2, 3],
    "token_ids": [4, 5, 6],
    "step_map": [1, 3, 2],
    "tail_token_ids": [7, 8],
    "tail_step_map": [2, 4],
}
BARE = {name: value for name, value in GOOD.items() if not name.startswith("tail")}


def read(tmp_path, *records: dict, **settings):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_traces(str(path), LIMITS, 4, **settings)


@pytest.mark.parametrize("block", [1, 4, 8])
def test_what_is_written_is_read_back(tmp_path, block: int) -> None:
    rng = np.random.default_rng(0)
    traces = [random_trace(1 + n, 1 + n * n % 11, block, rng) for n in range(9)]
    write_jsonl(tmp_path / "out.jsonl", [trace_record(trace, index, 0, "text") for index, trace in enumerate(traces)])
    found = read_traces(str(tmp_path / "out.jsonl"), LIMITS, default_block_size=4)
    for line, trace in zip(found, traces, strict=True):
        for name in ("prompt_ids", "response_ids", "tail_ids", "steps", "tail_steps"):
            value = getattr(line.trace, name)
            assert value.dtype == np.int64 and np.array_equal(value, getattr(trace, name)), name
        assert np.array_equal(line.logprobs, trace.logprobs)  # every digit
        assert (line.trace.sampling.block_size, line.trace.sampling.temperature) == (block, 1.0)


def test_how_a_response_was_drawn_is_kept(tmp_path) -> None:
    sampling = SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        max_new_tokens=9,
        block_size=8,
        denoising_steps=3,
        remasking="entropy_bounded",
        threshold=0.75,
        confidence="margin",
        entropy_bound=1.5,
        prefix_cache=False,
        horizon=6,
    )
    trace = dataclasses.replace(random_trace(3, 5, 8, np.random.default_rng(0)), sampling=sampling)
    write_jsonl(tmp_path / "out.jsonl", [trace_record(trace, 0, 0, "text")])
    (line,) = read_traces(str(tmp_path / "out.jsonl"), LIMITS, default_block_size=4)
    assert line.trace.sampling == sampling
    (old,) = read(tmp_path, GOOD)
    assert old.trace.sampling == SamplingParams(block_size=4, denoising_steps=4)


def test_flags_beat_the_line_and_the_line_beats_the_defaults(tmp_path) -> None:
    said = {**GOOD, "block_size": 8, "temperature": 0.5}
    seen = lambda line: (line.trace.sampling.block_size, line.trace.sampling.temperature)
    (silent,) = read(tmp_path, {**GOOD, "tail_token_ids": [7, 8], "tail_step_map": [2, 4]})
    assert seen(silent) == (4, 1.0)
    (own,) = read(tmp_path, said)
    assert seen(own) == (8, 0.5)
    (forced,) = read(tmp_path, said, block_size=4, temperature=2.0)
    assert seen(forced) == (4, 2.0)


def test_a_tail_that_does_not_matter_may_be_missing(tmp_path) -> None:
    whole, first_step, nothing = read(
        tmp_path,
        {**BARE, "token_ids": [4, 5, 6, 7, 8], "step_map": [1, 1, 1, 1, 1]},  # ends with its block
        {**BARE, "step_map": [2, 3, 3]},  # the terminal block was all hidden at step 3, the first after 2
        {**BARE, "token_ids": [], "step_map": []},
    )
    assert len(whole.trace.tail_ids) == 0 and len(nothing.trace.tail_ids) == 0
    trace = first_step.trace
    assert len(trace.tail_ids) == 2 and (trace.tail_steps > trace.steps.max()).all() and MASK_ID not in trace.tokens


@pytest.mark.parametrize("steps", [[1, 2, 3], [1, 3, 3], [2, 2, 2]])
def test_a_tail_that_matters_may_not(tmp_path, steps: list[int]) -> None:
    """Two tokens of the terminal block at two steps; at one step, but the tail may have come before."""
    with pytest.raises(DataError, match="in.jsonl, line 1: the response ends 2 tokens before the end of its block"):
        read(tmp_path, {**BARE, "step_map": steps})


CANVAS = {**GOOD, "tail_token_ids": [7], "tail_step_map": [2], "block_size": 4, "max_new_tokens": 9}


def read_full(tmp_path, *records: dict, **settings):
    """As a model of full attention has them read."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_traces(str(path), LIMITS, None, **settings)


def test_under_full_attention_blocks_begin_with_the_response_and_end_with_the_canvas(tmp_path) -> None:
    bare = {name: value for name, value in CANVAS.items() if not name.startswith("tail")}
    said, cut, first_step, last = read_full(
        tmp_path,
        CANVAS,
        {**bare, "max_new_tokens": 3},  # the third token is the last there can be
        {**bare, "step_map": [1, 1, 1]},
        {**bare, "token_ids": [4] * 9, "step_map": [1] * 8 + [5]},
    )
    assert [len(line.trace.tail_ids) for line in (said, cut, first_step, last)] == [1, 0, 1, 0]
    assert [line.trace.canvas_length for line in (said, cut, first_step, last)] == [12, 6, 12, 12]
    assert said.trace.sampling.horizon is None and first_step.trace.tail_steps.tolist() == [2]


@pytest.mark.parametrize("response", [1, 4, 6, 8, 11])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_what_a_model_of_full_attention_wrote_is_read_back(tmp_path, block: int, response: int) -> None:
    trace = random_trace(3, response, block, np.random.default_rng(0), full=True, behind=2, horizon=5)
    write_jsonl(tmp_path / "out.jsonl", [trace_record(trace, 0, 0, "text")])
    (line,) = read_traces(str(tmp_path / "out.jsonl"), LIMITS, None)
    assert np.array_equal(line.trace.tokens, trace.tokens) and np.array_equal(line.trace.all_steps, trace.all_steps)
    assert line.trace.sampling == trace.sampling and line.trace.canvas_length == trace.canvas_length


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(block_size=None), "the line has no 'block_size' to say where they were"),
        (dict(max_new_tokens=None), "the line has no 'max_new_tokens' to say where they were"),
        (dict(max_new_tokens=2), "'token_ids' has 3 entries, more than 'max_new_tokens' 2"),
        (dict(max_new_tokens="9"), "the field 'max_new_tokens' is '9'. Use a whole number of 1 or more"),
        (dict(horizon=-1), "the field 'horizon' is '-1'. Use a whole number of 0 or more"),
        (dict(max_new_tokens=62), "this text has 65 tokens with its canvas, and the model has 64 positions"),
        (dict(tail_token_ids=[7, 8], tail_step_map=[2, 4]), "'tail_token_ids' has 2 tokens, and 1 are missing"),
        (dict(tail_token_ids=None, tail_step_map=None), "the response ends 1 tokens before the end of its block of 4"),
    ],
)
def test_a_line_that_does_not_tell_its_canvas_is_refused(tmp_path, changes: dict, words: str) -> None:
    with pytest.raises(DataError, match=f"in.jsonl, line 1: .*{words}"):
        read_full(tmp_path, {**CANVAS, **changes})


def test_other_blocks_than_those_of_the_draw(tmp_path) -> None:
    """Grown in blocks of 8 (3 + 3 + 2): scored in blocks of 4, the tail ends with the second; in blocks of 16 the text
    ends inside the first."""
    line = {**GOOD, "block_size": 8}
    for block, tail in [(4, 2), (2, 0), (1, 0), (16, 2)]:
        (found,) = read(tmp_path, line, block_size=block)
        assert len(found.trace.tail_ids) == len(found.trace.tail_steps) == tail
    (alone,) = read(tmp_path, {**BARE, "block_size": 1}, block_size=4)
    assert len(alone.trace.tail_ids) == 0


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(step_map=[1, 2]), "'token_ids' has 3 entries and 'step_map' 2"),
        (dict(tail_step_map=[1]), "'tail_token_ids' has 2 entries and 'tail_step_map' 1"),
        (dict(tail_step_map=None), "the field 'tail_step_map' is a JSON null, not a list"),
        (dict(tail_token_ids=[7], tail_step_map=[1]), "'tail_token_ids' has 1 tokens, and 2 are missing"),
        (dict(tail_token_ids=[7] * 6, tail_step_map=[1] * 6), "'tail_token_ids' has 6 tokens, and 2 are missing"),
        (dict(token_ids=[4, PAD_ID + 1, 6]), f"entry 1 of 'token_ids' is {PAD_ID + 1}, which is no token"),
        (dict(prompt_token_ids=[-1, 2, 3]), "entry 0 of 'prompt_token_ids' is -1, which is no token"),
        (dict(tail_token_ids=[7, 10**30]), "entry 1 of 'tail_token_ids' is 1000000"),
        (dict(token_ids=[4, 5, MASK_ID]), "entry 2 of 'token_ids' is the mask token"),
        (dict(prompt_token_ids=[1, MASK_ID, 3]), "entry 1 of 'prompt_token_ids' is the mask token"),
        (dict(tail_token_ids=[MASK_ID, 3]), "entry 0 of 'tail_token_ids' is the mask token"),
        (dict(step_map=[1, 0, 2]), "entry 1 of 'step_map' is 0. Denoising steps are counted from 1"),
        (dict(tail_step_map=[-1, 2]), "entry 0 of 'tail_step_map' is -1"),
        (dict(step_map=[1, 2.0, 2]), "entry 1 of 'step_map' is '2.0', not a whole number"),
        (dict(token_ids=[4, True, 6]), "entry 1 of 'token_ids' is 'True', not a whole number"),
        (dict(token_ids=[[4], 5, 6]), "entry 0 of 'token_ids' is '[4]', not a whole number"),
        (dict(token_ids="4 5 6"), "the field 'token_ids' is a JSON string, not a list"),
        (dict(token_ids=None), "the field 'token_ids' is a JSON null, not a list"),
        (dict(block_size=0), "the field 'block_size' is '0'"),
        (dict(block_size=4.0), "the field 'block_size' is '4.0'. Use a whole number of 1 or more"),
        (dict(temperature=-1), "the field 'temperature' is '-1'. Use a number of 0 or more"),
        (dict(temperature=float("inf")), "the field 'temperature' is 'inf'"),
        (dict(temperature=10**400), "the field 'temperature' is '1000"),
        (dict(temperature="hot"), "the field 'temperature' is 'hot'"),
        (dict(horizon=1.5), "the field 'horizon' is '1.5', not a whole number"),
        (dict(confidence=1), "the field 'confidence' is '1', not text"),
        (dict(entropy_bound="x"), "the field 'entropy_bound' is 'x', not a number"),
        (dict(prefix_cache=1), "the field 'prefix_cache' is '1', not true or false"),
        (dict(logprobs=[-1.0, -2.0]), "'logprobs' is not a list of one number for each"),
        (dict(logprobs={}), "'logprobs' is not a list of one number for each"),
        (dict(logprobs=[-1.0, None, -2.0]), "entry 1 of 'logprobs' is 'None', not a number"),
        (dict(logprobs=[-1.0, float("nan"), -2.0]), "entry 1 of 'logprobs' is 'nan', not a number"),
        (dict(prompt_token_ids=[1] * 62, tail_token_ids=[1] * 3, tail_step_map=[1] * 3), "has 68 tokens"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, changes: dict, words: str) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, GOOD, {**GOOD, **changes})
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/in.jsonl, line 2: ") and words in message


@pytest.mark.parametrize("missing", ["prompt_token_ids", "token_ids", "step_map", "tail_step_map", "tail_token_ids"])
def test_a_field_that_is_missing(tmp_path, missing: str) -> None:
    with pytest.raises(DataError, match=f"line 1: the field '{missing}' is missing"):
        read(tmp_path, {name: value for name, value in GOOD.items() if name != missing})
