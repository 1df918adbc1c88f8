"""Supervised samples: three ways to write them, the stop token, and what is left out."""

from __future__ import annotations

import json

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.sft_data import load_sft


def _load(tmp_path, tokenizer, *records, **options):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_sft([str(path)], tokenizer, **options)


def test_one_sample(tmp_path, tiny):
    (sample,), dropped = _load(
        tmp_path, tiny, {"question": "1+1=", "response": "\\boxed{2}"}, prompt_template="Q: {question}"
    )
    assert tiny.decode(list(sample.prompt_ids)) == "Q: 1+1="
    assert tiny.decode(list(sample.response_ids)) == "\\boxed{2}<|endoftext|>"
    assert dropped == 0


@pytest.mark.parametrize("response", ["2", "2<|endoftext|>", "", "<|endoftext|>"])
def test_a_response_ends_in_one_stop_token(tmp_path, tiny, response):
    (sample,), _ = _load(tmp_path, tiny, {"prompt": "1+1=", "response": response})
    assert sample.response_ids.count(tiny.eos_id) == 1 and sample.response_ids[-1] == tiny.eos_id


def test_a_conversation(tmp_path, qwen):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "1+1?"), ("assistant", "2")]
    (sample,), _ = _load(tmp_path, qwen, {"messages": [{"role": role, "content": text} for role, text in turns]})
    assert qwen.decode(list(sample.prompt_ids)).endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert sample.response_ids == (*qwen.encode("2"), qwen.eos_id)


def test_questions_go_through_the_chat_template_if_asked(tmp_path, qwen):
    record = {"question": "1+1?", "response": "2"}
    (sample,), _ = _load(tmp_path, qwen, record, apply_chat_template=True)
    assert qwen.decode(list(sample.prompt_ids)) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def test_long_samples_are_left_out_and_counted(tmp_path, tiny):
    short, long = {"question": "1+1=", "response": "2"}, {"question": "1+1=", "response": "22"}
    samples, dropped = _load(tmp_path, tiny, short, long, seq_length=6)  # 4 + 1 + stop
    assert len(samples) == 1 and dropped == 1
    with pytest.raises(DataError, match="all 2 are longer than --seq-length 5"):
        _load(tmp_path, tiny, short, long, seq_length=5)


def test_keys_tell_responses_apart(tmp_path, tiny):
    records = [{"question": "1+1=", "response": text} for text in ("2", "3", "2")]
    (a, b, c), _ = _load(tmp_path, tiny, *records)
    assert a.key == c.key != b.key  # repeated samples are kept: people repeat them on purpose


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "1"}, "line 2: the field 'response' is missing"),
        ({"response": "1"}, "line 2: no prompt was found"),
        ({"messages": [{"role": "user", "content": "1"}]}, "line 2: 'messages' must end in a turn of the assistant"),
        (
            {"messages": [{"role": "assistant", "content": "1"}]},
            "line 2: 'messages' must end in a turn of the assistant",
        ),
        ({"messages": "hi"}, "line 2: 'messages' must be a non-empty list"),
    ],
)
def test_sentences(tmp_path, tiny, record, words):
    with pytest.raises(DataError, match=words):
        _load(tmp_path, tiny, {"question": "1+1=", "response": "2"}, record)
