"""A file that grows by parts: killed at every moment, gone on with, and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_dlm.config.errors import ConfigError, DataError
from megatron_dlm.data.unfinished import Identity, Unfinished, refuse_complete

IDENTITY = Identity({"the file of --input": "ab"}, {"--tokens-per-step": 1, "--bf16": False, "--block-size": None})
RECORDS = [{"n": n, "text": "ä" * n} for n in range(7)]
EXPECTED = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


class Killed(BaseException):
    """The end of a process, as far as files can tell."""


def write_all(path: Path, identity: Identity = IDENTITY, at_once: int = 3) -> tuple[int, dict]:
    """The whole file, or the rest of it. Returns where it began, and the totals."""
    output = Unfinished.begin(str(path), identity)
    began = output.lines
    for start in range(began, len(RECORDS), at_once):
        part = RECORDS[start : start + at_once]
        output.add(part, {"sum": output.totals.get("sum", 0) + sum(record["n"] for record in part)})
    output.finish()
    return began, output.totals


def test_a_file_appears_when_it_is_complete(tmp_path) -> None:
    path = tmp_path / "out.jsonl"
    output = Unfinished.begin(str(path), IDENTITY)
    output.add(RECORDS[:3], {})
    assert not path.exists() and output.lines == 3
    output.add(RECORDS[3:], {"sum": 21})
    output.finish()
    assert path.read_bytes() == EXPECTED and output.totals == {"sum": 21} and os.listdir(tmp_path) == ["out.jsonl"]


def killed_at(monkeypatch, number: int, after: bool, path: Path) -> bool:
    """Write the file and die before or after the `number`-th time that something is made to last; whether it came to
    that."""
    with monkeypatch.context() as patched:
        calls = []

        def deadly(function):
            def call(*args):
                calls.append(function)
                if len(calls) == number and not after:
                    raise Killed
                result = function(*args)
                if len(calls) == number:
                    raise Killed
                return result

            return call

        for name in ("fsync", "replace", "unlink"):
            patched.setattr(os, name, deadly(getattr(os, name)))
        try:
            write_all(path)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(monkeypatch, tmp_path, after: bool) -> None:
    moments, began = 0, set()
    while True:
        path = tmp_path / f"{moments}.jsonl"
        if not killed_at(monkeypatch, moments + 1, after, path):
            break
        moments += 1
        if not path.exists():
            start, totals = write_all(path)
            began.add(start)
            assert totals == {"sum": 21}
        assert path.read_bytes() == EXPECTED
        left = [name for name in os.listdir(tmp_path) if name.startswith(f"{moments - 1}.") and ".unfinished" in name]
        assert left in ([], [f"{moments - 1}.jsonl.unfinished.json"])  # the note, after a kill in the last instant
    assert moments > 12 and began == {0, 3, 6, 7}


def test_what_a_kill_left_behind_the_last_part_is_cut_off(tmp_path) -> None:
    path = tmp_path / "out.jsonl"
    output = Unfinished.begin(str(path), IDENTITY)
    output.add(RECORDS[:3], {"sum": 3})
    output.file.write(b'{"n": 3, "te')
    output.close()
    assert write_all(path) == (3, {"sum": 21}) and path.read_bytes() == EXPECTED


def begun(path: Path) -> None:
    output = Unfinished.begin(str(path), IDENTITY)
    output.add(RECORDS[:3], {})
    output.close()


@pytest.mark.parametrize(
    "identity, words",
    [
        (Identity({"the file of --input": "cd"}, IDENTITY.flags), "begun with other contents of the file of --input."),
        (Identity(IDENTITY.contents, {"--tokens-per-step": 2}), "with --tokens-per-step 1, and this run has 2."),
        (Identity(IDENTITY.contents, {"--bf16": True}), "with --bf16 off, and this run has on."),
        (Identity(IDENTITY.contents, {"--new": "x" * 99}), "with --new off, and this run has xxx"),
    ],
)
def test_other_settings_are_refused(tmp_path, identity: Identity, words: str) -> None:
    begun(tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl.unfinished").read_bytes()
    with pytest.raises(ConfigError, match="Start with the same to go on, or delete out.jsonl.unfinished and ") as found:
        Unfinished.begin(str(tmp_path / "out.jsonl"), identity)
    assert words in str(found.value) and len(str(found.value)) < 500
    assert (tmp_path / "out.jsonl.unfinished").read_bytes() == before


def test_a_complete_file_is_refused(tmp_path) -> None:
    refuse_complete(str(tmp_path / "out.jsonl"))
    write_all(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match=r"--output .*out.jsonl is there already"):
        write_all(tmp_path / "out.jsonl")


def test_two_processes_do_not_write_one_file(tmp_path) -> None:
    first = Unfinished.begin(str(tmp_path / "out.jsonl"), IDENTITY)
    with pytest.raises(ConfigError, match="is being written by another process"):
        Unfinished.begin(str(tmp_path / "out.jsonl"), IDENTITY)
    first.close()
    write_all(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "note", [None, "", "[]", "{}", '{"version": 2}', '{"version": 1, "lines": 1, "bytes": "1", "totals": {}}']
)
def test_a_note_that_says_nothing_is_refused(tmp_path, note: str | None) -> None:
    path = tmp_path / "out.jsonl.unfinished.json"
    begun(tmp_path / "out.jsonl")
    path.unlink() if note is None else path.write_text(note)
    with pytest.raises(DataError, match=r"unfinished.json does not say how far out.jsonl.unfinished is good. Delete"):
        write_all(tmp_path / "out.jsonl")


def test_a_file_that_was_cut_is_refused(tmp_path) -> None:
    begun(tmp_path / "out.jsonl")
    os.truncate(tmp_path / "out.jsonl.unfinished", 20)
    with pytest.raises(DataError, match=r"has 20 bytes, and out.jsonl.unfinished.json says \d+. Delete both"):
        write_all(tmp_path / "out.jsonl")


def test_a_place_without_room_is_told(tmp_path, monkeypatch) -> None:
    output = Unfinished.begin(str(tmp_path / "out.jsonl"), IDENTITY)
    output.add(RECORDS[:3], {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"\(No space left on device\). Give a place with room .* the 3 lines"):
            output.add(RECORDS[3:], {})
    output.close()
    assert write_all(tmp_path / "out.jsonl")[0] == 3 and (tmp_path / "out.jsonl").read_bytes() == EXPECTED
    with pytest.raises(ConfigError, match="cannot be written to"):
        Unfinished.begin(str(tmp_path / "out.jsonl" / "below"), IDENTITY)
