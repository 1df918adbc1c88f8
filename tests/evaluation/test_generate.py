"""Responses to a file of prompts: against the naive engine, and against themselves in other files and layouts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.config.rollout import EngineConfig
from megatron_dlm.data.records import content_key
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.evaluation.generate import (
    PromptLine,
    check_room,
    describe,
    generate_records,
    read_prompt_lines,
    summarize,
)
from megatron_dlm.rollout.request import Request, rollout_stream
from tests.diffusion.oracles import MASK_ID, PAD_ID
from tests.harness import pool
from tests.tiny import Words, disturb, make_session, quiet

SAMPLING = SamplingParams(max_new_tokens=11, stop_token_ids=(5, 6, 7), threshold=0.3)
SEED = 3


def prompt_lists(count: int = 9) -> list[list[int]]:
    """Prompts of all lengths modulo 8; the first stands three times in all."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, 1 + n).tolist() for n in range(count)]
    return [*prompts[:4], prompts[0], *prompts[4:], prompts[0]]


def write_prompts(path: Path, prompts: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"prompt_token_ids": prompt}) + "\n" for prompt in prompts))
    return path


def open_model(**changes: object):
    session = make_session(**changes)
    state = session.train_state(None, 1)
    disturb(state.module, 0)
    return session, state


def generate_file(
    session,
    state,
    path: Path,
    sampling: SamplingParams = SAMPLING,
    samples: int = 2,
    slots: int = 256,
    limit: int = 8192,
) -> list[dict]:
    from megatron_dlm.rollout.rig import RolloutRig

    lines = read_prompt_lines(str(path), session.tokenizer, "{question}", False)
    longest = max(len(line.token_ids) for line in lines) + 8  # room for the terminal block
    engine = EngineConfig(max_running_requests=slots, max_tokens_per_pass=limit)
    rig = RolloutRig.open(session, state, engine, longest, sampling.max_new_tokens)
    return generate_records(rig, session.tokenizer, lines, samples, [sampling] * len(lines), SEED, quiet())


def drawn(record: dict) -> tuple:
    """What must be equal to the last token, without the numbers that round."""
    names = ("prompt_token_ids", "token_ids", "step_map", "tail_token_ids", "tail_step_map", "finish_reason", "text")
    return tuple(json.dumps(record[name]) for name in (*names, "num_forwards", "block_size", "temperature"))


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [drawn(record) for record in found] == [drawn(record) for record in expected]
    for one, other in zip(found, expected):
        for name in ("logprobs", "sampling_logprobs"):
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def model():
    return open_model(fp64=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", prompt_lists())


@pytest.fixture(scope="module")
def records(model, prompts) -> list[dict]:
    return generate_file(*model, prompts)


def test_records_are_the_traces_of_the_naive_engine(records) -> None:
    from tests.rollout.naive import generate
    from tests.tiny import make_model

    model, given, seen = make_model(), prompt_lists(), {}
    assert [(record["index"], record["sample"]) for record in records] == [
        (index, sample) for index in range(len(given)) for sample in range(2)
    ]
    for record in records:
        prompt = given[record["index"]]
        key = content_key(" ".join(map(str, prompt)))
        number = seen.setdefault(key, -1) + 1
        seen[key] = number
        stream = rollout_stream(SEED, 0, f"generate/{key}", number)
        naive = generate(model, Request(np.array(prompt), SAMPLING, key, number, stream))
        assert record["prompt_token_ids"] == prompt
        assert record["token_ids"] == naive.response and record["step_map"] == naive.steps
        assert record["tail_token_ids"] == naive.tail and record["tail_step_map"] == naive.tail_steps
        assert (record["finish_reason"], record["num_forwards"]) == (naive.reason, naive.forwards)
        np.testing.assert_allclose(record["logprobs"], naive.logprobs, rtol=0, atol=1e-10)
        np.testing.assert_allclose(record["sampling_logprobs"], naive.sampling_logprobs, rtol=0, atol=1e-10)
        assert record["text"] == Words().decode(naive.response, skip_special_tokens=True)
        assert (record["block_size"], record["temperature"]) == (4, 1.0)


def test_fields_end_at_the_stop_token_or_the_limit(records) -> None:
    reasons = set()
    for record in records:
        length, tail = len(record["token_ids"]), record["tail_token_ids"]
        assert all(len(record[name]) == length for name in ("step_map", "logprobs", "sampling_logprobs"))
        assert len(tail) == len(record["tail_step_map"]) < 4
        assert (len(record["prompt_token_ids"]) + length + len(tail)) % 4 == 0
        assert min(record["step_map"]) >= 1 and MASK_ID not in record["token_ids"] + tail
        stops = [token in SAMPLING.stop_token_ids for token in record["token_ids"]]
        assert not any(stops[:-1]) and 1 <= length <= 11
        if record["finish_reason"] == "stop":
            assert stops[-1]
        else:
            assert record["finish_reason"] == "length" and length == 11
        reasons.add(record["finish_reason"])
    assert reasons == {"stop", "length"}
    assert any(set(record["prompt_token_ids"]) & {5, 6, 7} for record in records)  # which ended nothing


def test_the_same_prompt_gets_other_draws_each_time(records) -> None:
    first, second, third = [
        [drawn(record) for record in records if record["index"] == index] for index in (0, 4, len(prompt_lists()) - 1)
    ]
    assert len({*first, *second, *third}) == 6


def test_a_prompt_is_the_same_as_text_and_as_ids(model, tmp_path) -> None:
    ids = write_prompts(tmp_path / "ids.jsonl", [[3, 1, 4, 1, 5]])
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "3 1 4 1 5"}\n')
    assert_same(generate_file(*model, text), generate_file(*model, ids))


def test_order_of_the_lines_does_not_matter(model, prompts, records, tmp_path) -> None:
    given = prompt_lists()
    order = np.random.default_rng(1).permutation(len(given))
    found = generate_file(*model, write_prompts(tmp_path / "other.jsonl", [given[n] for n in order]))
    assert sorted(map(drawn, found)) == sorted(map(drawn, records))
    for record in found:
        assert record["prompt_token_ids"] == given[order[record["index"]]]


@pytest.mark.parametrize("slots, limit", [(1, 8192), (3, 8192), (256, 1), (5, 20)])
def test_batches_do_not_matter(model, prompts, records, slots: int, limit: int) -> None:
    assert_same(generate_file(*model, prompts, slots=slots, limit=limit), records)


def test_fewer_samples_are_the_first_ones(model, records, tmp_path) -> None:
    path = write_prompts(tmp_path / "one.jsonl", prompt_lists()[:4])
    assert_same(generate_file(*model, path, samples=1), records[:8:2])


def test_another_seed_draws_other_responses(model, prompts, records, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.SEED", SEED + 1)
    other = generate_file(*model, prompts)
    assert sum(drawn(one) == drawn(two) for one, two in zip(other, records)) < len(records) / 2


LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "tp2 sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "tp2 pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


def parallel_model(parallel: dict, load_from: Path | None):
    """The float64 model in some layout, its weights read from a checkpoint."""
    from megatron_dlm.checkpoint.distributed import load
    from megatron_dlm.config.parallel import ParallelConfig
    from megatron_dlm.parallel.groups import initialize
    from megatron_dlm.training.setup import Session
    from tests.tiny import model_config, vocabulary

    settings = ParallelConfig(**parallel)
    session = Session(model_config(fp64=True), settings, Words(), initialize(settings, seed=1), vocabulary())
    state = session.train_state(None, 1)
    if load_from is not None:
        load(state, load_from, with_optimizer=False)
    return session, state


def save_start(folder: Path) -> None:
    from megatron_dlm.checkpoint.distributed import save

    _, state = parallel_model({}, None)
    disturb(state.module, 0)
    save(state, folder, 0, {}, with_optimizer=False)


def generate_in(parallel: dict, start: Path, prompts: Path) -> list[dict]:
    return generate_file(*parallel_model(parallel, start), prompts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_do_not_matter(prompts, records, tmp_path, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    pool(1).run(save_start, tmp_path / "start")
    found, *others = pool(world).run(generate_in, parallel, tmp_path / "start", prompts)
    assert_same(found, records)
    assert all(other == [] for other in others)


def line(length: int) -> PromptLine:
    return PromptLine("f.jsonl, line 7", 0, tuple(range(length)), "k", 0)


def test_a_prompt_that_leaves_no_room_is_refused_by_its_line() -> None:
    of = lambda tokens, block: SamplingParams(max_new_tokens=tokens, block_size=block)
    assert check_room([line(5)], [of(11, 4)], False, 16) == 16
    assert check_room([line(5)], [of(12, 1)], False, 17) == 17
    assert check_room([line(5), line(9)], [of(12, 4), of(1, 2)], True, 17) == 17  # no terminal block to complete
    with pytest.raises(DataError, match=r"f.jsonl, line 7: this prompt has 5 tokens.* needs 20 positions"):
        check_room([line(1), line(5)], [of(12, 4)] * 2, False, 17)
    with pytest.raises(DataError, match=r"with 13 new ones .*needs 18 positions"):
        check_room([line(1), line(5)], [of(16, 4), of(13, 2)], True, 17)


def test_each_line_is_sampled_by_its_own_settings(model, prompts, records) -> None:
    """In one file with others, and with the same draws as in a file where all lines have them."""
    session, state = model
    greedy = dataclasses.replace(SAMPLING, temperature=0.0, max_new_tokens=5, block_size=2, denoising_steps=2)
    lines = read_prompt_lines(str(prompts), session.tokenizer, "{question}", False)
    from megatron_dlm.rollout.rig import RolloutRig

    rig = RolloutRig.open(session, state, EngineConfig(max_running_requests=7), 40, 0)
    mixed = [greedy if index % 2 else SAMPLING for index in range(len(lines))]
    found = generate_records(rig, session.tokenizer, lines, 2, mixed, SEED, quiet())
    alone = generate_file(session, state, prompts, greedy)
    assert_same(found, [(alone if record["index"] % 2 else records)[n] for n, record in enumerate(records)])
    assert {record["temperature"] for record in found} == {0.0, 1.0}


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt_token_ids": [1, PAD_ID + 1]}, f"entry 1 of 'prompt_token_ids' is {PAD_ID + 1}, which is no token"),
        ({"prompt_token_ids": [MASK_ID]}, "entry 0 of 'prompt_token_ids' is the mask token"),
        ({"prompt_token_ids": [1.0]}, "entry 0 of 'prompt_token_ids' is '1.0', not a whole number"),
        ({"prompt_token_ids": "1 2"}, "the field 'prompt_token_ids' is a JSON string"),
        ({"prompt_token_ids": []}, "the prompt has no tokens"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": str(MASK_ID)}, "the prompt holds the mask token itself"),
        ({"text": "1"}, "no prompt was found (fields: text)"),
        ({"messages": []}, "'messages' must be a non-empty list"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, record: dict, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "1"}\n\n' + json.dumps(record) + "\n")
    with pytest.raises(DataError) as error:
        read_prompt_lines(str(path), Words(), "{question}", False)
    assert str(error.value).startswith(f"{path}, line 3: ") and words in str(error.value)


def test_the_summary_counts_tokens_and_steps(records) -> None:
    one = dict(token_ids=[1] * 6, step_map=[1] * 6, tail_step_map=[2, 2], num_forwards=2, finish_reason="length")
    other = dict(token_ids=[1] * 2, step_map=[2, 1], tail_step_map=[], num_forwards=2, finish_reason="stop")
    metrics = summarize([{**one, "logprobs": [-1.0] * 6}, {**other, "logprobs": [-3.0] * 2}])
    assert metrics == {
        "generate/responses": 2,
        "generate/response_len": 4,
        "generate/tokens_per_step": 2,
        "generate/tokens_per_forward": 2,
        "generate/logprob": -1.5,
        "generate/truncated_ratio": 0.5,
    }
    assert "2 responses in out.jsonl: mean length 4.0 tokens" in describe(metrics, "out.jsonl")
    assert summarize([]) == {}
