"""Train a small byte-level BPE tokenizer.

For models trained from scratch on a small corpus: every byte is in the vocabulary, so any text can be encoded; digits
stand alone, so that numbers of one length have one length in tokens; chosen strings (such as \\boxed{) can be tokens of
their own.

Invariants (tests/data/test_train_tokenizer.py): the saved folder loads with our Tokenizer and with
transformers.AutoTokenizer, has exactly the vocabulary size asked for or fewer tokens, and decode(encode(text)) == text.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dlm.config.errors import ConfigError, DataError, DependencyError
from megatron_dlm.data.jsonl import read_jsonl
from megatron_dlm.data.tokenizer_huggingface import spell_as_before

MASK_TOKEN, EOS_TOKEN = "<|MASK|>", "<|endoftext|>"  # the stop token pads, too
BYTES = 256


def smallest_vocabulary(whole_tokens: Iterable[str] = ()) -> int:
    """Number of tokens without any merge: the bytes, mask and stop, and the whole tokens of more than one byte."""
    return BYTES + 2 + len({token for token in whole_tokens if len(token.encode()) > 1})


def texts_of(path: str | Path) -> Iterator[str]:
    """Texts of a file.

    All strings in the objects of .jsonl (and .jsonl.gz) files, nested ones included; the lines of any other file.

    Raises:
        DataError: the file is missing or malformed.
    """
    path = Path(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for _, record in read_jsonl(path):
            yield from _strings(record)
        return
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The text file {path} cannot be read ({error}). Give a UTF-8 text or .jsonl file.") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path, whole_tokens: Iterable[str] = ()) -> int:
    """Train on texts and save in HuggingFace's format.

    Args:
        texts: the corpus.
        vocab_size: upper bound of the vocabulary, mask, stop and whole tokens included; a small corpus may not fill it.
        folder: where to save; created if missing.
        whole_tokens: strings that are always one token, wherever they stand.

    Returns:
        The true size of the vocabulary.

    Raises:
        ConfigError: vocab_size is below `smallest_vocabulary`, or a whole token is empty.
        DataError: the folder cannot be written.
        DependencyError: the transformers package is absent.
    """
    whole_tokens = list(dict.fromkeys(whole_tokens))
    if "" in whole_tokens:
        raise ConfigError("A token cannot be empty. Leave '' out of --add-token.")
    smallest = smallest_vocabulary(whole_tokens)
    if vocab_size < smallest:
        raise ConfigError(
            f"A vocabulary of {vocab_size} is too small: {BYTES} bytes, mask, "
            f"stop and the added tokens need {smallest}. Ask for at least that."
        )
    try:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise DependencyError(
            "Tokenizers need the transformers package, which is not installed. Run: pip install transformers"
        ) from None

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - (smallest - BYTES - 2),
        special_tokens=[MASK_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(without(texts, whole_tokens), trainer)
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole_tokens])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token=MASK_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        wrapped.save_pretrained(str(folder))
        spell_as_before(Path(folder))
    except OSError as error:
        raise DataError(f"The tokenizer cannot be saved in {folder} ({error}). Choose another folder.") from None
    return len(wrapped)


def without(texts: Iterable[str], whole_tokens: list[str]) -> Iterator[str]:
    """The texts in pieces between the whole tokens, so that no merge is spent on what is never encoded by merges."""
    for text in texts:
        pieces = [text]
        for token in whole_tokens:
            pieces = [part for piece in pieces for part in piece.split(token)]
        yield from pieces


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
