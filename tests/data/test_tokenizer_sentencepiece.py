"""sentencepiece models, ours and foreign ones: what sentencepiece does to text by itself, and what is done about it."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys

import pytest

from megatron_dlm.config.errors import DataError, DependencyError
from megatron_dlm.data.tokenizer import Tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

SEED = 5
BITS = [
    "a",
    "12",
    " ",
    "  ",
    "▁",
    "<|MASK|>",
    "<|endoftext|>",
    "<|",
    "<unk>",
    "\n",
    "\0",
    "é",
    "中",
    "🙂",
    "\\boxed{",
    "}",
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model as others train them: a space before every text, spaces taken out, <s> and </s>, no pad and no mask."""
    folder, model = tmp_path_factory.mktemp("foreign"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["how many apples are there", "how many pears"] * 5),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture
def copy(foreign, tmp_path):
    """The foreign model with some settings."""

    def make(**settings):
        folder = shutil.copytree(foreign, tmp_path / "copy", dirs_exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.mark.parametrize("name", ["pieces", "foreign"])
def test_any_text_survives(name, request):
    found = request.getfixturevalue(name)
    tokenizer = found if isinstance(found, Tokenizer) else Tokenizer(found)
    draw = random.Random(SEED)
    for _ in range(500):
        bits = [draw.choice([*BITS, chr(draw.randrange(1, 0xD800))]) for _ in range(draw.randrange(12))]
        text = "".join(bits)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_plain_text_is_encoded_as_sentencepiece_does(pieces, pieces_folder):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces_folder / "tokenizer.model"))
    for text in ("how many apples", "12+34=\\boxed{46}", "é"):
        assert pieces.encode(text) == theirs.encode(text)
    assert theirs.decode(theirs.encode("a▁b")) == "a b", "the reason for spelling ▁ in bytes"
    assert theirs.encode("<|MASK|>") != [pieces.mask_id], "the reason for cutting text at special tokens"


def test_no_space_is_added(foreign):
    tokenizer = Tokenizer(foreign)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(foreign / "tokenizer.model"))
    assert theirs.decode(theirs.encode(" how  many ")) == "how many", "the model was trained to do so"
    assert tokenizer.encode(" how many") == theirs.encode("how many")
    assert tokenizer.decode(tokenizer.encode(" how  many ")) == " how  many "


def test_texts_joined_by_special_tokens(pieces):
    left, right = "how many ", " apples"
    assert pieces.encode(f"{left}<|MASK|><|endoftext|>{right}") == [
        *pieces.encode(left),
        pieces.mask_id,
        pieces.eos_id,
        *pieces.encode(right),
    ]


def test_roles_of_a_foreign_model(foreign):
    tokenizer = Tokenizer(foreign)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(foreign / "tokenizer.model"))
    assert tokenizer.eos_id == tokenizer.pad_id == theirs.eos_id()
    assert tokenizer.mask_id == theirs.get_piece_size() == tokenizer.vocab_size - 1
    assert tokenizer.encode("</s><|MASK|>") == [tokenizer.eos_id, tokenizer.mask_id]
    assert tokenizer.decode(tokenizer.encode("<s>a</s>"), skip_special_tokens=True) == "a"


def test_added_tokens(copy, tmp_path):
    size = Tokenizer(copy()).vocab_size - 1  # without the mask
    decoder = {
        str(size): {"content": "<gap>", "special": True},
        str(size + 1): {"content": "two words"},
        "1": {"content": "<start>", "special": True},  # the model calls it <s>
    }
    folder = copy(added_tokens_decoder=decoder, mask_token={"content": "<gap>"}, pad_token="<unk>", other="kept")
    first = Tokenizer(folder)
    first.save(tmp_path / "saved")
    for tokenizer in (first, Tokenizer(tmp_path / "saved")):
        assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.vocab_size) == (size, 0, size + 2)
        ids = tokenizer.encode("<start>two words<gap>")
        assert ids == [1, size + 1, size]
        assert tokenizer.decode(ids) == "<start>two words<gap>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "two words"
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["other"] == "kept"


def test_a_special_piece_of_the_model_stays_special(copy, tmp_path):
    word = Tokenizer(copy()).encode("h")[0]
    Tokenizer(copy(added_tokens_decoder={str(word): {"content": "h", "special": True}})).save(tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").decode([word], skip_special_tokens=True) == ""


def test_every_cut_is_noticed(foreign, tmp_path):
    """Also those between two fields of the file, which sentencepiece reads as a smaller model."""
    whole = (foreign / "tokenizer.model").read_bytes()
    read_by_sentencepiece = 0
    for length in range(0, len(whole)):
        try:
            sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(whole[:length])
        except RuntimeError:
            if length % 97:
                continue  # both refuse it; a sample is enough
        else:
            read_by_sentencepiece += 1
        (tmp_path / "tokenizer.model").write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut short, or no sentencepiece model. Give"):
            Tokenizer(tmp_path)
    assert read_by_sentencepiece


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"IQ== 0\nIg== 1\n", b"{}"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="cut short, or no sentencepiece model. Give"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(eos_token="<no>"), "eos_token <no> in .* is no token"),
        (dict(mask_token=5), "mask_token 5 in .* is no token"),
        (dict(added_tokens_decoder=[1]), "added_tokens_decoder in .* is malformed"),
        (dict(added_tokens_decoder={"x": {"content": "a"}}), "added_tokens_decoder in .* is malformed"),
        (dict(added_tokens_decoder={"-1": {"content": "a"}}), "added_tokens_decoder in .* is malformed"),
        (dict(added_tokens_decoder={"4": {"content": ""}}), "added_tokens_decoder in .* is malformed"),
        (dict(added_tokens_decoder={"5000": {"content": "a"}}), "do not have the ids that follow the .* Number them"),
        (dict(chat_template=5), "chat_template in .* is not text"),
    ],
)
def test_settings_that_cannot_be(copy, settings, words):
    with pytest.raises(DataError, match=words):
        Tokenizer(copy(**settings))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_settings_that_are_no_object(copy, content):
    folder = copy()
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer settings .* Correct the file"):
        Tokenizer(folder)


def test_a_model_without_a_stop_token(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["how many apples"]),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        model_type="bpe",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="declares no eos_token. Add it to its tokenizer_config.json"):
        Tokenizer(tmp_path)


def test_the_package_is_named_when_it_is_missing(foreign, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DependencyError, match="tokenizer.model needs the sentencepiece package.* Run: pip install"):
        Tokenizer(foreign)
