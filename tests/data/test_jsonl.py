"""JSON lines: what is read, and the sentence for each thing that can be wrong."""

from __future__ import annotations

import gzip

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.jsonl import integers_field, read_jsonl, text_field, write_jsonl


def test_reads_objects_with_their_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"b": "é\u2028x"}\n', encoding="utf-8")
    assert read_jsonl(path) == [(1, {"a": 1}), (3, {"b": "é\u2028x"})]


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_line_endings(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}' + (ending or "\n").encode() + b'{"a": 2}' + ending.encode())
    assert [record["a"] for _, record in read_jsonl(path)] == [1, 2]


def test_reads_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert read_jsonl(path) == [(1, {"a": 1})]


def test_what_is_written_is_read(tmp_path):
    records = [{"question": "ü\n2", "n": 1}, {"question": "\u2028"}]
    write_jsonl(tmp_path / "a.jsonl", records)
    assert [record for _, record in read_jsonl(tmp_path / "a.jsonl")] == records


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n{"a": }\n', ["line 2", "not JSON"]),
        (b'{"a": 1}\n[1]\n', ["line 2", "list, not an object"]),
        (b"null\n", ["line 1", "null, not an object"]),
        (b"", ["no samples"]),
        (b"\n  \n", ["no samples"]),
        (b'{"a": 1}\n{"a": "\xff"}\n', ["line 2", "UTF-8"]),
        (b"[" * 200_000, ["line 1"]),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    assert all(word in str(error.value) for word in [str(path), *words])


def test_missing_file_folder_and_false_gzip(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain text")
    for path, word in [
        (tmp_path / "no.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "a.jsonl.gz", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=word):
            read_jsonl(path)


def test_text_field():
    assert text_field({"a": "x"}, "a", "f") == "x"
    assert text_field({"a": 3}, "a", "f") == "3"
    assert text_field({"a": None}, "a", "f", null="") == ""
    for record, word in [
        ({"b": 1}, "missing"),
        ({"a": [1]}, "list, not text"),
        ({"a": None}, "null, not text"),
        ({"a": True}, "boolean, not text"),
    ]:
        with pytest.raises(DataError, match=f"^f: .*{word}"):
            text_field(record, "a", "f")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path, link = tmp_path / "a.jsonl", tmp_path / "link.jsonl"
    path.write_text("old\n")
    link.symlink_to(path)

    def records():
        yield {"a": 1}
        assert path.read_text() == "old\n"
        yield {"a": {1, 2}}  # JSON has no sets

    with pytest.raises(TypeError):
        write_jsonl(link, records())
    assert path.read_text() == "old\n"
    write_jsonl(link, [{"a": 1}])
    assert path.read_text() == '{"a": 1}\n' and link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "link.jsonl"]


def test_integers_field():
    assert integers_field({"a": [3, -1]}, "a", "f") == [3, -1]
    for record, word in [
        ({"b": 1}, "missing"),
        ({"a": 1}, "number, not a list"),
        ({"a": [1, "2"]}, "entry 1 of 'a' is '2'"),
        ({"a": [True]}, "entry 0 of 'a' is 'True'"),
    ]:
        with pytest.raises(DataError, match=f"^f: .*{word}"):
            integers_field(record, "a", "f")
