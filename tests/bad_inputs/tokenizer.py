"""Tokenizers."""

from __future__ import annotations

from pathlib import Path

from tests.bad_inputs.bench import Bad, all_of, binary, edit_json, folder_at, remove, text, truncate

FILE, SETTINGS = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
PIECES = "tokenizer/tokenizer.model"


def _words(id: str, write, says: str | tuple[str, ...], base: str = "sft", flags: str = "", kind="DataError") -> Bad:
    return Bad(id, base, flags, says, write=write, kind=kind)


def _pieces(folder: Path) -> None:
    """A sentencepiece tokenizer in the place of the other."""
    from megatron_dlm.data.train_sentencepiece import train_sentencepiece

    remove("tokenizer")(folder)
    train_sentencepiece(["one two three four " * 3], 300, folder / "tokenizer")


def _other_words(folder: Path) -> None:
    """Another tokenizer, with more words, than the one the checkpoint was trained with."""
    from megatron_dlm.data.train_tokenizer import train_tokenizer

    train_tokenizer(["one two three four " * 3], 300, folder / "other")


ENTRIES = [
    _words("no such tokenizer", remove("tokenizer"), "tokenizer"),
    _words("an empty tokenizer folder", folder_at("tokenizer"), "tokenizer.json"),
    _words("a name on the hub", None, "Qwen/Qwen3-0.6B", flags="--tokenizer-model Qwen/Qwen3-0.6B"),
    _words("the file instead of the folder", None, "tokenizer/tokenizer.json", flags=f"--tokenizer-model {FILE}"),
    _words("garbage in tokenizer.json", text(FILE, "{"), "tokenizer"),
    _words("an empty tokenizer.json", text(FILE, ""), "tokenizer"),
    _words("a truncated tokenizer.json", truncate(FILE), "tokenizer"),
    _words("bytes in tokenizer.json", binary(FILE, b"\xff\xfe\x00"), "tokenizer"),
    _words("a list in tokenizer.json", text(FILE, "[]"), "tokenizer"),
    _words("an object in tokenizer.json", text(FILE, "{}"), "tokenizer"),
    _words("a tokenizer without a model", edit_json(FILE, model=None), "tokenizer"),
    _words("garbage in tokenizer_config.json", text(SETTINGS, "{"), "tokenizer"),
    _words("a list in tokenizer_config.json", text(SETTINGS, "[]"), "tokenizer"),
    _words("no stop token", edit_json(SETTINGS, eos_token=None), "eos_token"),
    _words("a stop token that is a number", edit_json(SETTINGS, eos_token=5), "tokenizer"),
    _words("no settings", remove("tokenizer/tokenizer_config.json"), "eos_token"),
    _words(
        "the checkpoint's own is damaged",
        truncate("ckpt/iter_0000002/tokenizer/tokenizer.json"),
        "iter_0000002/tokenizer",
        "generate",
    ),
    _words(
        "the checkpoint's own is gone",
        remove("ckpt/iter_0000002/tokenizer"),
        "--tokenizer-model is not set",
        "generate",
        kind="ConfigError",
    ),
    _words(
        "vocab.json alone",
        all_of(remove(FILE), text("tokenizer/vocab.json", "{}"), text("tokenizer/merges.txt", "")),
        ("only vocab.json and merges.txt", "save_pretrained"),
    ),
    _words("a mask id out of place", None, ("mask id 300", "free id is 2"), flags="--mask-token-id 300"),
    _words("a mask id below zero", None, "mask id -1", flags="--mask-token-id=-1"),
    _words("the stop token as the mask", None, "both mask and stop token", flags="--mask-token-id 1"),
    _words("a mask id that is a word", None, "--mask-token-id", flags="--mask-token-id x", kind="ConfigError"),
    _words("a truncated tokenizer.model", all_of(_pieces, truncate(PIECES)), "tokenizer/tokenizer.model is cut short"),
    _words("an empty tokenizer.model", all_of(_pieces, text(PIECES, "")), "tokenizer/tokenizer.model is cut short"),
    _words(
        "no stop token in tokenizer.model", all_of(_pieces, edit_json(SETTINGS, eos_token="<no>")), "eos_token <no>"
    ),
    _words("no chat template beside tokenizer.model", _pieces, "no chat template", flags="--apply-chat-template"),
    Bad(
        "no sentencepiece",
        "sft",
        says=("tokenizer.model", "pip install sentencepiece"),
        write=_pieces,
        kind="DependencyError",
        absent=("sentencepiece",),
    ),
    _words("no chat template", None, ("tokenizer", "chat template"), flags="--apply-chat-template"),
    _words("no chat template for prompts", None, "chat template", "tracerl", "--apply-chat-template"),
    _words(
        "a broken chat template",
        edit_json(SETTINGS, chat_template="{% for x in %}"),
        "chat template",
        flags="--apply-chat-template",
    ),
    _words(
        "a chat template that refuses",
        edit_json(SETTINGS, chat_template="{{ raise_exception('no') }}"),
        "chat template",
        flags="--apply-chat-template",
    ),
    _words(
        "a chat template of another kind",
        edit_json(SETTINGS, chat_template=5),
        "tokenizer",
        flags="--apply-chat-template",
    ),
    _words(
        "a chat template that divides by zero",
        edit_json(SETTINGS, chat_template="{{ 1 // 0 }}"),
        "chat template",
        "evaluate",
        "--apply-chat-template",
    ),
    _words(
        "another tokenizer", _other_words, ("--vocab-size",), "evaluate", "--tokenizer-model other", kind="ConfigError"
    ),
    _words(
        "another tokenizer to resume",
        all_of(_other_words),
        ("--vocab-size",),
        "resume",
        "--tokenizer-model other",
        kind="ConfigError",
    ),
]
