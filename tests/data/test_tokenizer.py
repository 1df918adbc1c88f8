"""The tokenizer: text survives it, and mask, stop and pad are where they belong."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.tokenizer import MASK_TOKENS, Tokenizer

TEXTS = ["", "1", "12+34=\\boxed{46}", " two  spaces\nand\ttab ", "é中🙂", "a\u2028b"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["tiny", "qwen"])
def test_text_survives(name, text, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(
        0 <= token < tokenizer.vocab_size for token in [*ids, tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id]
    )


def test_special_tokens_are_read_and_skipped(tiny):
    ids = tiny.encode("1<|MASK|>2<|endoftext|>")
    assert ids[1] == tiny.mask_id and ids[3] == tiny.eos_id and len(ids) == 4
    assert tiny.decode(ids, skip_special_tokens=True) == "12"
    assert tiny.decode(ids) == "1<|MASK|>2<|endoftext|>"


def test_mask_is_added_where_there_is_none(qwen):
    assert qwen.mask_id == 151669 and qwen.vocab_size == 151670  # where SDAR and TraDo have theirs
    assert qwen.decode([qwen.mask_id]) == "<|MASK|>"


@pytest.mark.parametrize("name", MASK_TOKENS)
def test_mask_is_found_by_name(tiny_folder, tmp_path, name):
    folder = _edited(tiny_folder, tmp_path, config={"mask_token": None}, rename={"<|MASK|>": name})
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode(name) == [tokenizer.mask_id]
    assert tokenizer.vocab_size == Tokenizer(tiny_folder).vocab_size


def test_pad_falls_back_to_the_stop_token(tiny_folder, tmp_path):
    tokenizer = Tokenizer(_edited(tiny_folder, tmp_path, config={"pad_token": None}))
    assert tokenizer.pad_id == tokenizer.eos_id


def test_chat_template(qwen):
    ids = qwen.apply_chat_template([{"role": "user", "content": "hi"}])
    assert qwen.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_sentences(tiny, tiny_folder, tmp_path):
    with pytest.raises(DataError, match="has no chat template"):
        tiny.apply_chat_template([{"role": "user", "content": "hi"}])
    with pytest.raises(DataError, match="no tokenizer.json"):
        Tokenizer(tmp_path)
    with pytest.raises(DataError, match="no eos_token"):
        Tokenizer(_edited(tiny_folder, tmp_path / "a", config={"eos_token": None}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        Tokenizer(tmp_path)
    strict = _edited(tiny_folder, tmp_path / "b", config={"chat_template": "{{ raise_exception('users only') }}"})
    with pytest.raises(DataError, match="refuses a conversation .users only"):
        Tokenizer(strict).apply_chat_template([{"role": "user", "content": "hi"}])


def _edited(source, target, config=None, rename=None):
    """A copy of a tokenizer with other entries in its configuration and other names for its tokens."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), **(config or {})}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    path = target / "tokenizer.json"
    text = path.read_text()
    for old, new in (rename or {}).items():
        text = text.replace(old, new)
    path.write_text(text)
    return target
