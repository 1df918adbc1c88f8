"""Prompts: what is read, and what is left out."""

from __future__ import annotations

import json

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.prompts import Dropped, load_prompts


def _file(tmp_path, *records, name="p.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _ask(question, answer="1"):
    return {"question": question, "ground_truth_answer": answer}


def test_one_prompt(tmp_path, tiny):
    (prompt,), dropped = load_prompts([_file(tmp_path, _ask("1+1=", 2))], tiny, "Q: {question}")
    assert tiny.decode(list(prompt.token_ids)) == "Q: 1+1="
    assert (prompt.question, prompt.ground_truth, prompt.verifier) == ("1+1=", "2", "math")
    assert dropped == Dropped(0, 0, 0) and prompt.source.endswith(".jsonl")


def test_what_is_left_out_is_counted(tmp_path, tiny):
    records = [_ask("1+1="), _ask(" 1+1= "), _ask("1+1+1+1="), _ask("2+2=", None), _ask("3+3=", " "), _ask("4+4=")]
    prompts, dropped = load_prompts([_file(tmp_path, *records)], tiny, max_prompt_len=4)
    assert [prompt.question for prompt in prompts] == ["1+1=", "4+4="]
    assert dropped == Dropped(too_long=1, duplicate=1, no_answer=2)


def test_keys_do_not_depend_on_file_or_template(tmp_path, tiny):
    (a,), _ = load_prompts([_file(tmp_path, _ask("1+1="), name="a.jsonl")], tiny)
    (b,), _ = load_prompts([_file(tmp_path, _ask("1+1="), name="b.jsonl")], tiny, "Solve {question}")
    assert a.key == b.key and a.token_ids != b.token_ids


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([_ask("1+1="), {"question": "2+2="}], "line 2: the field 'ground_truth_answer' is missing"),
        ([{"ground_truth_answer": "1"}], "line 1: no prompt was found"),
        ([_ask("1+1+1+1+1=")], "No prompt of at most 5 tokens"),
    ],
)
def test_sentences(tmp_path, tiny, records, words):
    with pytest.raises(DataError, match=words):
        load_prompts([_file(tmp_path, *records)], tiny, max_prompt_len=5)


def test_generated_tasks(tmp_path, tiny):
    pytest.importorskip("reasoning_gym")
    sources = [_file(tmp_path, _ask("1+1=")), "reasoning_gym:chain_sum?size=7&seed=3"]
    prompts, dropped = load_prompts(sources, tiny, "{question}\n")
    assert len(prompts) + dropped.duplicate == 8
    assert [prompt.verifier for prompt in prompts] == ["math"] + ["reasoning_gym"] * (len(prompts) - 1)
    again, _ = load_prompts(sources, tiny, "{question}\n")
    assert [prompt.source for prompt in prompts] == sources[:1] + sources[1:] * (len(prompts) - 1)
    assert again == prompts and again[-1].metadata == prompts[-1].metadata
