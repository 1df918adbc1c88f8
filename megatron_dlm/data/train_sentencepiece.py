"""Train a small sentencepiece tokenizer.

The counterpart of data/train_tokenizer.py for those who want a sentencepiece model: pairs of neighbours are merged as
there, but over characters; a character that has no token is spelled in bytes.

Invariants (tests/data/test_train_sentencepiece.py): the saved folder loads with our Tokenizer, has the vocabulary size
asked for or less, and decode(encode(text)) == text for every text.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megatron_dlm.config.errors import ConfigError, DataError, DependencyError
from megatron_dlm.data.tokenizer_sentencepiece import SETTINGS, SPACE, VOCABULARY
from megatron_dlm.data.train_tokenizer import BYTES, EOS_TOKEN, MASK_TOKEN, without

PAD_TOKEN, UNKNOWN = "<|pad|>", "<unk>"  # the unknown token is never used: bytes spell what is unknown
OWN = (UNKNOWN, EOS_TOKEN, PAD_TOKEN, MASK_TOKEN)
_LONGEST = 4096  # bytes of a training sentence; sentencepiece leaves out longer ones


def smallest_vocabulary(whole_tokens: Iterable[str] = ()) -> int:
    """Number of tokens without any merge: bytes, the four own tokens, whole tokens, and one character."""
    return BYTES + len(OWN) + len(set(whole_tokens)) + 1


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, folder: str | Path, whole_tokens: Iterable[str] = ()
) -> int:
    """Train on texts and save tokenizer.model and tokenizer_config.json.

    Args: as `train_tokenizer`.

    Returns:
        The true size of the vocabulary.

    Raises:
        ConfigError: vocab_size is below `smallest_vocabulary`, or a whole token cannot be one.
        DataError: there is no text, or the folder cannot be written.
        DependencyError: the sentencepiece package is absent.
    """
    whole_tokens = list(dict.fromkeys(whole_tokens))
    spelled = {f"<0x{byte:02X}>" for byte in range(BYTES)}
    taken = [token for token in whole_tokens if not token or token in OWN or token in spelled or SPACE in token]
    if taken:
        raise ConfigError(
            f"{taken[0]!r} cannot be added: it is empty, or sentencepiece uses it itself. Leave it out of --add-token."
        )
    smallest = smallest_vocabulary(whole_tokens)
    if vocab_size < smallest:
        raise ConfigError(
            f"A vocabulary of {vocab_size} is too small: {BYTES} bytes, {', '.join(OWN)}, the added tokens "
            f"and a character need {smallest}. Ask for at least that."
        )
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError:
        raise DependencyError(
            "--type sentencepiece needs the sentencepiece package, which is not installed. "
            "Run: pip install sentencepiece"
        ) from None
    sentences = _sentences(without(texts, whole_tokens), room=vocab_size - smallest + 1)
    if not sentences:
        raise DataError("There is no text to train a tokenizer on. Give files that hold some.")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        max_sentence_length=_LONGEST,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        eos_id=1,
        pad_id=2,
        bos_id=-1,
        unk_piece=UNKNOWN,
        eos_piece=EOS_TOKEN,
        pad_piece=PAD_TOKEN,
        control_symbols=[MASK_TOKEN],
        user_defined_symbols=[token.replace(" ", SPACE) for token in whole_tokens],
        num_threads=1,
        minloglevel=2,
    )
    settings = {"eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN, "mask_token": MASK_TOKEN, "unk_token": UNKNOWN}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / VOCABULARY).write_bytes(model.getvalue())
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"The tokenizer cannot be saved in {folder} ({error}). Choose another folder.") from None
    return _size(model.getvalue())


def _sentences(texts: Iterable[str], room: int) -> list[str]:
    """What sentencepiece learns from: the texts, cut at rare characters and at _LONGEST.

    sentencepiece gives every character of its corpus a token, and refuses if they do not fit. Here at most half of the
    room goes to characters, the most frequent ones; bytes spell the others.
    """
    texts = [text for text in texts if text]
    counts = Counter(character for text in texts for character in text if character not in (SPACE, "\0"))
    kept = set(sorted(counts, key=lambda character: (-counts[character], character))[: max(1, room // 2)])
    sentences = []
    for text in texts:
        known = "".join(character if character in kept else "\0" for character in text)
        for part in filter(None, known.split("\0")):
            width = _LONGEST // 4  # a character has at most 4 bytes
            sentences += [part[start : start + width] for start in range(0, len(part), width)]
    return sentences


def _size(model: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor.get_piece_size()
