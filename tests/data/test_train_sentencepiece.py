"""Training a sentencepiece tokenizer: size, digits, whole tokens, rare characters."""

from __future__ import annotations

import sys

import pytest

from megatron_dlm.config.errors import ConfigError, DataError, DependencyError
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.data.train_sentencepiece import smallest_vocabulary, train_sentencepiece

pytest.importorskip("sentencepiece")

CORPUS = ["how many apples are there", "how many pears are 12345 there", "so \\boxed{12345}"] * 5
WHOLE = ["\\boxed{", "}", "step 1", 'a,"b"', "\n\n"]


@pytest.mark.parametrize("whole", [[], WHOLE])
@pytest.mark.parametrize("extra", [0, 10, 40])
def test_size(tmp_path, whole, extra):
    wanted = smallest_vocabulary(whole) + extra
    assert train_sentencepiece(CORPUS, wanted, tmp_path, whole) == wanted == Tokenizer(tmp_path).vocab_size


def test_tokens(tmp_path):
    train_sentencepiece(CORPUS, 330, tmp_path, WHOLE)
    tokenizer = Tokenizer(tmp_path)
    text = 'many 12345 apples=\\boxed{7} step 1\n\na,"b"xstep 1'
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece.strip().isdigit()] == list("123457")
    assert all(pieces.count(token) == text.count(token) for token in WHOLE)
    assert any(len(piece) > 2 for piece in pieces[:3])
    assert len({tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id}) == 3
    assert tokenizer.encode("<|MASK|><|endoftext|><|pad|>") == [tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id]


def test_small_corpus_gives_a_small_vocabulary(tmp_path):
    size = train_sentencepiece(["ab ab"], 5000, tmp_path)
    assert size == Tokenizer(tmp_path).vocab_size < 300


def test_rare_characters_are_spelled_in_bytes(tmp_path):
    """More characters than fit: sentencepiece alone would refuse."""
    rare = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 500))
    size = train_sentencepiece([*CORPUS, rare], 300, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert size == tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(rare)) == rare
    assert len(tokenizer.encode("there")) < 5 and len(tokenizer.encode(rare[-1])) == 3


def test_long_texts_are_learned_from(tmp_path):
    """sentencepiece alone would leave them out."""
    train_sentencepiece(["apple" * 2000, "pear"], 290, tmp_path)
    assert len(Tokenizer(tmp_path).encode("apple" * 10)) <= 10


def test_the_same_corpus_gives_the_same_model(tmp_path):
    models = []
    for name in ("a", "b"):
        train_sentencepiece(CORPUS, 320, tmp_path / name, WHOLE)
        models.append((tmp_path / name / "tokenizer.model").read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("texts", [[], [""], ["}"]])
def test_no_text(tmp_path, texts):
    with pytest.raises(DataError, match="no text to train"):
        train_sentencepiece(texts, 300, tmp_path, WHOLE)


@pytest.mark.parametrize("token", ["", "<|MASK|>", "<unk>", "<0x41>", "a▁b"])
def test_tokens_that_cannot_be_added(tmp_path, token):
    with pytest.raises(ConfigError, match="cannot be added.* Leave it out of --add-token"):
        train_sentencepiece(CORPUS, 300, tmp_path, [token])


def test_too_small(tmp_path):
    with pytest.raises(ConfigError, match="vocabulary of 100 is too small.* 266"):
        train_sentencepiece(CORPUS, 100, tmp_path, WHOLE)


def test_the_package_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DependencyError, match="--type sentencepiece needs .* Run: pip install sentencepiece"):
        train_sentencepiece(CORPUS, 300, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be saved .* Choose another folder"):
        train_sentencepiece(CORPUS, 300, tmp_path / "file")
