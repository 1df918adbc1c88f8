"""What holds for tokenizers of both kinds: text survives, and mask, stop and pad are where they belong."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.tokenizer import MASK_TOKENS, Tokenizer
from megatron_dlm.data.train_tokenizer import texts_of
from tests.data.conftest import TEST_DATA

TEXTS = [
    "",
    "1",
    "12+34=\\boxed{46}",
    " two  spaces\nand\ttab ",
    "é中🙂",
    "a\u2028b",
    "\0",
    "\r\n",
    "▁ ▁x▁",
    "<0x41><unk>",
]
KINDS = ["tiny", "pieces"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "hi"}]
SPEC_MATH = "What is 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture
def folder(kind, request):
    return request.getfixturevalue(f"{kind}_folder")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*KINDS, "qwen"])
def test_text_survives(name, text, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(
        0 <= token < tokenizer.vocab_size for token in [*ids, tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id]
    )


@pytest.mark.parametrize("name", [*KINDS, "qwen"])
def test_problem_sets_survive(name, request):
    """Every 16th text of every problem set."""
    files = sorted(TEST_DATA.glob("*.jsonl*"))
    if not files:
        pytest.skip("no problem sets in MEGATRON_DLM_TEST_DATA")
    tokenizer = request.getfixturevalue(name)
    for file in files:
        for text in list(texts_of(file))[::16]:
            assert tokenizer.decode(tokenizer.encode(text)) == text, file


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_are_read_and_skipped(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("1<|MASK|>2<|endoftext|>")
    assert ids[1] == tokenizer.mask_id and ids[3] == tokenizer.eos_id and len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12"
    assert tokenizer.decode(ids) == "1<|MASK|>2<|endoftext|>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same(folder, tmp_path):
    """So it is when it has a mask of another name, and a chat template."""
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "chat_template.jinja").write_text(CHATML)
    given = Tokenizer(source).encode("7")[0]
    for mask_id in (None, given):
        first = Tokenizer(source, mask_id)
        first.save(tmp_path / "saved")
        again = Tokenizer(tmp_path / "saved")
        again.save(tmp_path / "twice")
        for other in (again, Tokenizer(tmp_path / "twice"), Tokenizer(tmp_path / "saved", first.mask_id)):
            for what in ("vocab_size", "mask_id", "eos_id", "pad_id"):
                assert getattr(other, what) == getattr(first, what), what
            assert other.apply_chat_template(QUESTION) == first.apply_chat_template(QUESTION)
            assert [other.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]
    assert first.mask_id == given != Tokenizer(source).mask_id


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_id_is_the_mask(folder):
    plain = Tokenizer(folder)
    other = plain.encode("7")[0]
    tokenizer = Tokenizer(folder, other)
    assert tokenizer.mask_id == other and tokenizer.vocab_size == plain.vocab_size
    assert tokenizer.decode([other], skip_special_tokens=True) == ""
    assert Tokenizer(folder, plain.mask_id).mask_id == plain.mask_id


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_id_is_added_if_it_is_the_next(folder, tmp_path):
    size = Tokenizer(folder).vocab_size
    tokenizer = Tokenizer(folder, size)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (size, size + 1)
    name = tokenizer.decode([size])
    assert name in MASK_TOKENS[1:]  # the first one is another token here
    assert tokenizer.encode(f"1{name}2")[1] == size
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).mask_id == size and Tokenizer(tmp_path).decode([size]) == name
    with pytest.raises(DataError, match=f"mask id {size + 1} is no token .* next free id is {size}. Use the"):
        Tokenizer(folder, size + 1)


@pytest.mark.parametrize("wrong", [-1, 10**15, "5", True, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_id(folder, wrong):
    with pytest.raises(DataError, match=f"mask id {wrong} is no token"):
        Tokenizer(folder, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stop_token_is_no_mask(folder):
    with pytest.raises(DataError, match="both mask and stop token"):
        Tokenizer(folder, Tokenizer(folder).eos_id)


@pytest.mark.parametrize("kind", KINDS)
def test_chat_template(folder, tmp_path):
    """The file counts more than the setting; both are kept by a save."""
    source = shutil.copytree(folder, tmp_path / "source")
    settings = source / "tokenizer_config.json"
    with pytest.raises(DataError, match="has no chat template"):
        Tokenizer(source).apply_chat_template(QUESTION)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": "{{ eos_token }}x"}))
    tokenizer = Tokenizer(source)
    assert tokenizer.decode(tokenizer.apply_chat_template(QUESTION)) == "<|endoftext|>x"
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").apply_chat_template(QUESTION) == tokenizer.apply_chat_template(QUESTION)
    (source / "chat_template.jinja").write_text(CHATML)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": SPEC_MATH}]
    assert tokenizer.decode(Tokenizer(source).apply_chat_template(messages)) == (
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{SPEC_MATH}<|im_end|>\n<|im_start|>assistant\n"
    )
    (source / "chat_template.jinja").write_text("{{ raise_exception('users only') }}")
    with pytest.raises(DataError, match="refuses a conversation .users only"):
        Tokenizer(source).apply_chat_template(QUESTION)
    (source / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="refuses a conversation"):
        Tokenizer(source).apply_chat_template(QUESTION)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer.json and no tokenizer.model in .*Give"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(DataError, match=r"no tokenizer.json in .* only vocab.json and merges.txt.* Run: python -c"):
        Tokenizer(tmp_path)
