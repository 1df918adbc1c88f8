"""Training a tokenizer: size, digits, whole tokens, and that others can load it."""

from __future__ import annotations

import gzip

import pytest

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.data.train_tokenizer import smallest_vocabulary, texts_of, train_tokenizer

CORPUS = ["how many apples are there", "how many pears are 12345 there", "so \\boxed{12345}"] * 5
WHOLE = ["\\boxed{", "}"]


@pytest.mark.parametrize("whole", [[], WHOLE])
@pytest.mark.parametrize("extra", [0, 10])
def test_size(tmp_path, whole, extra):
    wanted = smallest_vocabulary(whole) + extra
    assert train_tokenizer(CORPUS, wanted, tmp_path, whole) == wanted == Tokenizer(tmp_path).vocab_size


def test_tokens(tmp_path):
    train_tokenizer(CORPUS, 300, tmp_path, WHOLE)
    tokenizer = Tokenizer(tmp_path)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("many 12345 apples=\\boxed{7}")]
    assert "".join(pieces) == "many 12345 apples=\\boxed{7}"
    assert [piece for piece in pieces if any(letter.isdigit() for letter in piece)] == list("123457")
    assert "\\boxed{" in pieces and "}" in pieces and any(len(piece) > 2 for piece in pieces[:3])
    assert tokenizer.pad_id == tokenizer.eos_id != tokenizer.mask_id


def test_loads_with_transformers(tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(CORPUS, 300, tmp_path, WHOLE)
    text = "how many 12 \\boxed{3} é"
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert theirs.encode(text) == Tokenizer(tmp_path).encode(text)
    assert theirs.mask_token == "<|MASK|>"


def test_small_corpus_gives_a_small_vocabulary(tmp_path):
    size = train_tokenizer(["ab ab"], 5000, tmp_path)
    assert size == Tokenizer(tmp_path).vocab_size < 300


def test_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "x", "n": 3, "m": [{"content": "y"}]}\n')
    (tmp_path / "b.txt").write_text("l1\nl2\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"l3"))
    assert [list(texts_of(tmp_path / name)) for name in ("a.jsonl", "b.txt", "c.txt.gz")] == [
        ["x", "y"],
        ["l1\n", "l2\n"],
        ["l3"],
    ]
    with pytest.raises(DataError, match="cannot be read"):
        list(texts_of(tmp_path / "no.txt"))


def test_too_small(tmp_path):
    with pytest.raises(ConfigError, match="vocabulary of 100 is too small.* 259"):
        train_tokenizer(CORPUS, 100, tmp_path, WHOLE)
