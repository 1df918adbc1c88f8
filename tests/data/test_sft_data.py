"""Supervised samples: three ways to write them, the stop token, and what is left out."""

from __future__ import annotations

import json

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.sft_data import load_sft
from megatron_dlm.data.tokenizer import Tokenizer, opened, without_opening


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


def test_token_ids_beat_text_and_are_taken_as_they_are(tmp_path, tiny):
    record = {"question": "1+1=", "response": "3", "text": "4", "token_ids": [20, 21], "step_map": [2, 1]}
    tail = {"tail_token_ids": [tiny.eos_id], "tail_step_map": [2]}
    first, second, third = _load(
        tmp_path,
        tiny,
        record,
        record | tail | {"prompt_token_ids": [9, 10]},
        {"prompt": "1+1=", "token_ids": [20, 21], "step_map": None},
    )[0]
    assert first.prompt_ids == tuple(tiny.encode("1+1=")) == third.prompt_ids
    assert first.response_ids == (20, 21) == third.response_ids and first.step_map == (2, 1)
    assert (first.tail_ids, first.tail_steps) == ((), ()) and third.step_map is None
    assert (second.prompt_ids, second.tail_ids, second.tail_steps) == ((9, 10), (tiny.eos_id,), (2,))
    assert first.key == third.key != second.key


@pytest.mark.parametrize("seq_length", [1, 3, 4, 5, 100])
def test_a_text_is_cut_into_consecutive_pieces(tmp_path, tiny, seq_length):
    text = "12+34+56="
    whole = (*tiny.encode(text), tiny.eos_id)
    samples, dropped = _load(tmp_path, tiny, {"text": text}, seq_length=seq_length)
    assert dropped == 0 and sum((sample.response_ids for sample in samples), ()) == whole
    assert all(len(sample.response_ids) == seq_length for sample in samples[:-1])
    assert all(sample.prompt_ids == () and sample.step_map is None for sample in samples)
    assert len({sample.key for sample in samples}) == len(samples)


def test_a_step_map_is_never_cut(tmp_path, tiny):
    trace = {"prompt_token_ids": [], "token_ids": [20] * 9, "step_map": [1] * 9}
    samples, dropped = _load(tmp_path, tiny, trace, {"text": ""}, seq_length=8)
    assert dropped == 1 and [sample.response_ids for sample in samples] == [(tiny.eos_id,)]


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
        ({"prompt": "1", "response": "2", "step_map": [1, 2]}, "line 2: 'step_map' speaks of tokens"),
        ({"prompt": "1", "token_ids": [20], "step_map": [1, 2]}, "'token_ids' has 1 entries and 'step_map' 2"),
        ({"prompt": "1", "token_ids": [20], "step_map": [0]}, "entry 0 of 'step_map' is 0"),
        ({"prompt": "1", "token_ids": []}, "'token_ids' is empty"),
        ({"token_ids": [20]}, "line 2: no prompt was found"),
        ({"text": ["a"]}, "the field 'text' is a JSON list"),
        (
            {"prompt": "1", "token_ids": [20], "step_map": [1], "tail_token_ids": [20]},
            "the field 'tail_step_map' is missing",
        ),
    ],
)
def test_sentences(tmp_path, tiny, record, words):
    with pytest.raises(DataError, match=words):
        _load(tmp_path, tiny, {"question": "1+1=", "response": "2"}, record)


@pytest.mark.parametrize("response", ["<think>\nso</think> 2", "so</think> 2", "  <think>so</think> 2"])
def test_what_every_response_begins_with_stands_in_the_prompt(tmp_path, tiny_folder, response):
    thinks = Tokenizer(tiny_folder, response_prefix="<think>\n")
    (sample,), _ = _load(tmp_path, thinks, {"question": "1+1=", "response": response})
    assert thinks.decode(list(sample.prompt_ids)) == "1+1=<think>\n"
    assert thinks.decode(list(sample.response_ids[:-1])) == "so</think> 2"
    (sample,), _ = _load(tmp_path, thinks, {"prompt": "1+1=", "response": response})
    assert thinks.decode(list(sample.prompt_ids)) == "1+1=", "a prompt that is taken as it stands"
    assert thinks.decode(list(sample.response_ids[:-1])) == response


def test_a_template_that_opens_the_response_does_it_once():
    assert opened("user: x\nassistant: <think>\n", "<think>\n") == "user: x\nassistant: <think>\n"
    assert opened("assistant:", "<think>\n") == "assistant:<think>\n" and opened("x", "") == "x"
    assert without_opening("<think> a", "") == "<think> a" and without_opening("a <think>", "<think>") == "a <think>"
