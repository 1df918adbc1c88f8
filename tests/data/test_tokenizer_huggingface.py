"""HuggingFace tokenizers: ids stay those of the files, whatever the files call them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.records import question_tokens
from megatron_dlm.data.tokenizer import MASK_TOKENS, Tokenizer

TOKEN = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=False)


def test_mask_is_added_where_there_is_none(qwen):
    assert qwen.mask_id == 151669 and qwen.vocab_size == 151670  # where SDAR and TraDo have theirs
    assert qwen.decode([qwen.mask_id]) == "<|MASK|>"


@pytest.mark.parametrize(
    ("template", "question"),
    [
        ("{question}\nPlease reason step by step, and put your final answer within \\boxed{}.", "What is 1+1?"),
        ("You need to put your final answer in \\boxed{}. This is the problem:\n{question}", "What is 1+1?"),
    ],
)
def test_published_prompts(qwen, template, question):
    ids = question_tokens(question, qwen, template, apply_chat_template=True)
    text = template.replace("{question}", question)
    assert qwen.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert [ids[0], ids[-3]] == qwen.encode("<|im_start|><|im_start|>")


@pytest.mark.parametrize("name", MASK_TOKENS)
def test_mask_is_found_by_name(tiny_folder, tmp_path, name):
    folder = _edited(tiny_folder, tmp_path, config={"mask_token": None}, rename={"<|MASK|>": name})
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode(name) == [tokenizer.mask_id]
    assert tokenizer.vocab_size == Tokenizer(tiny_folder).vocab_size


def test_two_names_for_one_id(tiny_folder, tmp_path):
    """As in SDAR's files. transformers alone would make a second mask of the second name."""
    plain = Tokenizer(tiny_folder)
    decoder = {str(plain.mask_id): {**TOKEN, "content": "<|MASK|>"}}
    config = {"mask_token": "<|MASK|>", "added_tokens_decoder": decoder}
    folder = _edited(tiny_folder, tmp_path / "a", config, rename={"<|MASK|>": "<MASK>"})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    for given in (None, plain.mask_id):
        tokenizer = Tokenizer(folder, given)
        assert (tokenizer.mask_id, tokenizer.vocab_size) == (plain.mask_id, plain.vocab_size)
        assert tokenizer.decode([1, tokenizer.mask_id], skip_special_tokens=True) == plain.decode([1], True)
        assert tokenizer.encode("1<|MASK|>") == plain.encode("1<|MASK|>")
        assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "x"}])) == "x!"
        tokenizer.save(tmp_path / "saved")
        assert Tokenizer(tmp_path / "saved").mask_id == plain.mask_id


def test_a_second_mask_is_not_made_in_silence(tiny_folder, tmp_path):
    plain = Tokenizer(tiny_folder)
    folder = _edited(tiny_folder, tmp_path / "a", {"mask_token": "<|MASK|>"}, rename={"<|MASK|>": "<MASK>"})
    with pytest.raises(DataError, match=rf"mask_token <\|MASK\|>, which is not .* <MASK> \({plain.mask_id}\). Give"):
        Tokenizer(folder)
    tokenizer = Tokenizer(folder, plain.mask_id)
    assert tokenizer.mask_id == plain.mask_id
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").mask_id == plain.mask_id


def test_a_declared_mask_that_is_new_is_added(tiny_folder, tmp_path):
    folder = _edited(tiny_folder, tmp_path, {"mask_token": "<gap>"}, rename={"<|MASK|>": "<other>"})
    tokenizer = Tokenizer(folder)
    assert tokenizer.mask_id == Tokenizer(tiny_folder).vocab_size == tokenizer.vocab_size - 1
    assert tokenizer.encode("<gap>") == [tokenizer.mask_id]


def test_gaps_in_the_ids_are_refused(tiny_folder, tmp_path):
    """transformers alone would move all ids behind the gap."""
    folder = shutil.copytree(tiny_folder, tmp_path / "a")
    content = json.loads((folder / "tokenizer.json").read_text())
    size = Tokenizer(tiny_folder).vocab_size
    content["added_tokens"].append({**TOKEN, "id": size + 1, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"<new> .* has the id {size + 1} in its files and {size} .* gaps"):
        Tokenizer(folder)


def test_others_read_what_is_saved(tiny, tmp_path):
    """In the spelling that transformers 4 knows, too."""
    from transformers import AutoTokenizer

    tiny.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert theirs.encode("12+<|MASK|>") == tiny.encode("12+<|MASK|>")
    assert (theirs.mask_token_id, theirs.eos_token_id) == (tiny.mask_id, tiny.eos_id)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)


def test_pad_falls_back_to_the_stop_token(tiny_folder, tmp_path):
    tokenizer = Tokenizer(_edited(tiny_folder, tmp_path, config={"pad_token": None}))
    assert tokenizer.pad_id == tokenizer.eos_id


def test_sentences(tiny_folder, tmp_path):
    with pytest.raises(DataError, match="no eos_token"):
        Tokenizer(_edited(tiny_folder, tmp_path / "a", config={"eos_token": None}))
    for broken in ("{}", "[]", "{", ""):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(DataError, match="cannot be loaded"):
            Tokenizer(tmp_path)


def test_the_advice_for_vocabulary_and_merges_works(tiny_folder, tmp_path):
    """The command that the sentence gives makes a tokenizer with the same ids."""
    content = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    shutil.copyfile(tiny_folder / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    with pytest.raises(DataError) as refused:
        Tokenizer(tmp_path)
    code = re.search(r'python -c "(.*)"$', str(refused.value)).group(1)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    made, plain = Tokenizer(tmp_path), Tokenizer(tiny_folder)
    assert (made.mask_id, made.eos_id) == (plain.mask_id, plain.eos_id)
    assert made.encode("12+34= how many apples") == plain.encode("12+34= how many apples")


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
