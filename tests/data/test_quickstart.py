"""The quick-start data: nothing held out is trained on, and every response is right."""

from __future__ import annotations

import json

import pytest

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.data import quickstart
from megatron_dlm.data.prompts import load_prompts
from megatron_dlm.data.sft_data import load_sft
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.rewards.extract import last_boxed


def _operands(record):
    return tuple(sorted(int(term) for term in record["question"].rstrip("=").split("+")))


def test_sums_are_right():
    split = quickstart.sums(seed=0, num_train=200, num_test=50)
    assert (len(split.sft), len(split.prompts), len(split.heldout)) == (200, 200, 50)
    for record in split.sft:
        a, b, c = (int(term) for term in record["question"].rstrip("=").split("+"))
        assert record["response"] == f"{a + b}+{c}=\\boxed{{{a + b + c}}}"
    for record in (*split.prompts, *split.heldout):
        assert int(record["ground_truth_answer"]) == sum(_operands(record))


@pytest.mark.parametrize("seed", [0, 1])
def test_sums_have_no_operands_in_common(seed):
    split = quickstart.sums(seed, num_train=5000, num_test=500)
    triples = [_operands(record) for record in (*split.sft, *split.prompts, *split.heldout)]
    assert len(set(triples)) == len(triples)
    assert all(10 <= term <= 99 for triple in triples for term in triple)
    assert any(
        split.sft[i]["question"].split("+")[0] > split.sft[i]["question"].split("+")[1] for i in range(20)
    )  # not sorted


def test_what_is_held_out_depends_on_the_seed_alone():
    held = quickstart.sums(0, 100, 50).heldout
    assert held == quickstart.sums(0, 2000, 50).heldout
    assert held != quickstart.sums(1, 100, 50).heldout


def test_all_sums_can_be_used():
    split = quickstart.sums(0, 62_540, 500)
    assert len(split.sft) + len(split.prompts) + len(split.heldout) == 125_580
    with pytest.raises(ConfigError, match="--num-train 62540 or less"):
        quickstart.sums(0, 62_541, 500)


def _source(tmp_path, n=30):
    path = tmp_path / "source.jsonl"
    records = [
        {
            "question": f"Two times {i}?",
            "ground_truth_answer": str(2 * i),
            **({"solution": f"{i}+{i}"} if i % 2 else {}),
        }
        for i in range(n)
    ]
    records += [
        {"question": " Two  times 3?", "ground_truth_answer": "6"},
        {"question": "Why?", "ground_truth_answer": None},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_is_split(tmp_path):
    split = quickstart.from_source(_source(tmp_path), seed=0, num_train=None, num_test=10)
    assert len(split.sft) == len(split.prompts) == 20 and len(split.heldout) == 10
    held = {record["question"] for record in split.heldout}
    assert not held & {record["question"] for record in (*split.sft, *split.prompts)}
    responses = {record["question"]: record["response"] for record in split.sft}
    for record in split.prompts:
        number = int(record["ground_truth_answer"]) // 2
        assert (
            responses[record["question"]] == (f"{number}+{number}\n" if number % 2 else "") + f"\\boxed{{{2 * number}}}"
        )


def test_a_file_can_be_too_small(tmp_path):
    source = _source(tmp_path)
    assert len(quickstart.from_source(source, 0, num_train=5, num_test=25).sft) == 5
    for num_train, num_test in [(None, 30), (6, 25)]:
        with pytest.raises(DataError, match="has 30 different questions"):
            quickstart.from_source(source, 0, num_train, num_test)


@pytest.mark.parametrize(("num_train", "num_test"), [(0, 1), (1, 0), (-1, 5)])
def test_sizes_must_be_positive(num_train, num_test):
    with pytest.raises(ConfigError, match="at least 1"):
        quickstart.sums(0, num_train, num_test)


def test_the_folder_is_ready_for_training(tmp_path):
    line = quickstart.make(tmp_path / "out", None, seed=0, num_train=50, num_test=20)
    assert "50 supervised samples, 50 prompts, 20 held-out prompts and a tokenizer of 260 tokens" in line
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer")
    samples, _ = load_sft([str(tmp_path / "out" / "sft.jsonl")], tokenizer)
    assert {len(sample.prompt_ids) for sample in samples} == {8}
    assert all(len(sample.response_ids) <= 12 for sample in samples)  # "132+36", the box in two tokens, "168", stop
    prompts, _ = load_prompts([str(tmp_path / "out" / "prompts.jsonl")], tokenizer)
    held, _ = load_prompts([str(tmp_path / "out" / "heldout.jsonl")], tokenizer)
    assert len(held) == 20 and not {prompt.key for prompt in prompts} & {prompt.key for prompt in held}
    assert all(last_boxed(tokenizer.decode(list(sample.response_ids), True)) for sample in samples)


@pytest.mark.parametrize("slips", [0.0, 0.4, 1.0])
def test_the_teacher_slips_as_often_as_he_is_told(slips):
    samples = quickstart.sums(0, 2000, 1, slips=slips).sft
    wrong = 0
    for sample in samples:
        a, b, c = map(int, sample["question"].split("+"))
        first, rest = sample["response"].split("+")
        total = int(rest.split("{")[1].rstrip("}"))
        off = (int(first) - (a + b), total - (int(first) + c))
        assert 0 in off and set(off) <= {0, -10, -1, 1, 10}  # he goes on from what he wrote
        wrong += off != (0, 0)
    assert abs(wrong / len(samples) - slips) < 0.04


def test_a_share_of_slips_beyond_all_is_refused():
    with pytest.raises(ConfigError, match="--slips is 1.5"):
        quickstart.sums(0, 10, 1, slips=1.5)
