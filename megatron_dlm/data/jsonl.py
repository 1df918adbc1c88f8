"""JSON lines, and the sentences for what can be wrong with them.

Every file of samples enters the package through `read_jsonl`, so that a bad line is reported by file and line number
wherever it is used.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_dlm.config.errors import DataError


def read_jsonl(path: str | Path) -> list[tuple[int, dict]]:
    """All objects of a JSON-lines file; blank lines are skipped.

    Args:
        path: a text file with one JSON object per line, or the same compressed with gzip (name ends in .gz).

    Returns:
        (line number counted from 1, object) pairs, in file order.

    Raises:
        DataError: the file is missing, unreadable or holds no object; a line is not JSON or not an object.
    """
    path = Path(path)
    records = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            records.append((number, parse_line(line, path, number)))
    if not records:
        raise nothing_in(path)
    return records


def parse_line(line: str, path: str | Path, number: int) -> dict:
    """The object of one line that is not blank.

    Args:
        path, number: file and line, counted from 1, for the error.

    Raises:
        DataError: the line is not JSON, or not an object.
    """
    try:
        record = json.loads(line)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: this is not JSON ({error.msg} at column {error.colno}). "
            "Every line must be one JSON object."
        ) from None
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}, line {number}: the text holds \\u{ord(error.object[error.start]):x}, half of a character "
            "that JSON writes as two. Write the other half too, or take it out."
        ) from None
    except ValueError:  # Python's own limit
        raise DataError(
            f"{path}, line {number}: a number in it has thousands of digits. Write it as text, or shorten it."
        ) from None
    except RecursionError:
        raise DataError(
            f"{path}, line {number}: this JSON is nested too deeply. Every line must be one plain object."
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, line {number}: this is a JSON {_kind(record)}, not an object. Every line must be one JSON object."
        )
    return record


def nothing_in(path: str | Path) -> DataError:
    """What is said of a file without an object."""
    return DataError(f"{path} holds no samples. Give a file with one JSON object per line.")


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """Write one JSON object per line, UTF-8. The file appears whole or not at all: it is written beside its place."""
    path = Path(os.path.realpath(path))  # a link stays a link
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def text_field(record: dict, field: str, where: str, null: str | None = None) -> str:
    """A field that must be text; numbers are taken as their text, because answers are often written as numbers.

    Args:
        where: names the file and line, for the error.
        null: what a JSON null stands for; None refuses it.

    Raises:
        DataError: the field is absent, or neither text nor a number.
    """
    if field not in record:
        found = ", ".join(sorted(record)) or "no fields"
        raise DataError(f"{where}: the field '{field}' is missing (found: {found}). Add it to this line.")
    value = record[field]
    if value is None and null is not None:
        return null
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the field '{field}' is a JSON {_kind(value)}, not text. Write it as a string.")
    return value


def integers_field(record: dict, field: str, where: str) -> list[int]:
    """A field that must be a list of whole numbers.

    Raises:
        DataError: the field is absent, or something else.
    """
    if field not in record:
        found = ", ".join(sorted(record)) or "no fields"
        raise DataError(f"{where}: the field '{field}' is missing (found: {found}). Add it to this line.")
    values = record[field]
    if not isinstance(values, list):
        raise DataError(
            f"{where}: the field '{field}' is a JSON {_kind(values)}, not a list of whole numbers. Write a list."
        )
    for index, value in enumerate(values):
        if type(value) is not int:  # a bool is an int to isinstance
            raise DataError(
                f"{where}: entry {index} of '{field}' is {str(value)[:40]!r}, not a whole number. Write a flat list of "
                "whole numbers."
            )
    return values


@contextmanager
def told_by_path(path: str | Path) -> Iterator[None]:
    """Around the reading of a data file: what the system or gzip say against it becomes a sentence.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"The data file {path} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a file. Name a .jsonl file inside it.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"The data file {path} cannot be read ({reason}). Check the file and its path.") from None


def open_data(path: Path) -> IO[bytes]:
    """A data file for reading, decompressed where its name ends in .gz."""
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")


def not_utf8(path: str | Path, line: int, byte: int) -> DataError:
    """What is said of a file with a byte (its offset in the file) that is not UTF-8."""
    return DataError(f"{path}, line {line}: byte {byte} is not UTF-8. Save the file as UTF-8.")


def _lines(path: Path) -> list[str]:
    with told_by_path(path), open_data(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, raw[: error.start].count(b"\n") + 1, error.start) from None
    return text.split("\n")  # not splitlines: JSON strings may hold U+2028 and its kin


def _kind(value: object) -> str:
    names = {list: "list", dict: "object", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
