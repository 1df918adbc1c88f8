"""Indexed data: what `preprocess` cannot index, and what a run cannot read."""

from __future__ import annotations

from tests.bad_inputs.bench import Bad, binary, edit_json, edit_line, folder_at, line, remove, text, truncate


def _make(id: str, flags: str, says: str | tuple[str, ...], **changes) -> Bad:
    return Bad(id, "preprocess", flags, says, **changes)


def _read(id: str, write, says: str | tuple[str, ...], flags: str = "") -> Bad:
    return Bad(id, "sft-indexed", flags, says, write=write, kind="DataError")


def _blend(id: str, flags: str, says: str | tuple[str, ...], **changes) -> Bad:
    return Bad(id, "sft", flags, says, **changes)


TRACE = {"prompt_token_ids": [5, 6], "token_ids": [7, 8, 9], "step_map": [1, 2, 2]}

ENTRIES = [
    # ---- preprocess
    _make("nothing to index", "", "--input names no file", without="--input"),
    _make("no place for the index", "", "--output", without="--output"),
    _make("no tokenizer to index with", "", "--tokenizer-model", without="--tokenizer-model"),
    _make("a file in place of a prefix", "--output new.bin", ("--output new.bin", ".bin")),
    _make("a JSONL file as output", "--output sft.jsonl", ("--output sft.jsonl", ".jsonl")),
    _make("the input as output", "--input x --output x", ("--output x", "--input"), write=text("x", '{"text": "1"}')),
    _make("an input twice", "--input sft.jsonl sft.jsonl", "2 times"),
    _make("an input that is missing", "--input sft.jsonl nowhere.jsonl", "nowhere.jsonl", kind="DataError"),
    _make("no workers", "--workers 0", "--workers is 0"),
    _make("chunks of nothing", "--chunk-bytes 0", "--chunk-bytes is 0"),
    _make("nothing short enough", "--seq-length 1", ("all 25", "--seq-length 1"), kind="DataError"),
    _make("another's index", "", ("--output new", "new.bin"), write=binary("new.bin", b"tokens of somebody")),
    _make("another's JSON", "", ("--output new", "new.json"), write=text("new.json", '{"old": 1}')),
    _make("an index with other settings", "--output indexed --seq-length 12", ("indexed", "other settings")),
    _make("a place that cannot be made", "--output prompts.jsonl/new", "--output prompts.jsonl/new"),
    _make("under a launcher", "", "WORLD_SIZE is 2", environment={"RANK": "0", "WORLD_SIZE": "2"}),
    _make("a line that cannot be indexed", "", "sft.jsonl, line 3", kind="DataError", write=line("sft.jsonl", "{")),
    _make(
        "a step map of another length",
        "",
        ("sft.jsonl, line 3", "'step_map' 2"),
        kind="DataError",
        write=line("sft.jsonl", {**TRACE, "step_map": [1, 2]}),
    ),
    _make(
        "a step map without tokens",
        "",
        ("sft.jsonl, line 2", "'token_ids'"),
        kind="DataError",
        write=edit_line("sft.jsonl", 2, step_map=[1]),
    ),
    # ---- reading
    _read("a description that is missing", remove("indexed.json"), "has no indexed.json"),
    _read("a description that is cut", truncate("indexed.json"), "indexed.json"),
    _read("data that is missing", remove("indexed.bin"), "indexed.bin"),
    _read("data that is cut", truncate("indexed.bin"), ("indexed.bin", "bytes")),
    _read("an index that is missing", remove("indexed.idx"), "indexed.idx"),
    _read("an index that is cut", truncate("indexed.idx"), ("indexed.idx", "bytes")),
    _read("an index of the right size only", lambda folder: _overwrite(folder / "indexed.idx"), "is not an index"),
    _read("data of a later version", edit_json("indexed.json", version=2), ("version 2", "reads 1")),
    _read("data of another tokenizer", edit_json("indexed.json", tokenizer={"vocab_size": 7}), "one with 7 ids"),
    _read("a part of indexed data", remove("nothing"), "prefix", "--data-path indexed.idx"),
    _read("indexed data in a folder's place", folder_at("indexed.json"), "indexed.json"),
    _read("no such prefix", remove("nothing"), "nowhere does not exist", "--data-path nowhere"),
    _read("indexed data that is too long", remove("nothing"), ("all 25", "--seq-length 1"), "--seq-length 1"),
    # ---- blends
    _blend("one weight too few", "--data-path sft.jsonl indexed --data-weights 1", "--data-weights has 1 entries"),
    _blend("a weight of nothing", "--data-path sft.jsonl indexed --data-weights 1 0", ("indexed", "0.0")),
    _blend("a source with two weights", "--data-path indexed indexed --data-weights 1 2", "indexed twice"),
    Bad(
        "a place under other weights",
        "resume",
        "--data-weights 1",
        ("without --data-weights", "--finetune"),
        late=True,
    ),
    Bad("a place in other data", "resume", "--data-path indexed", ("JSONL files alone", "--finetune"), late=True),
]


def _overwrite(path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)
