"""JSON lines, and the sentences for what can be wrong with them.

Every file of samples enters the package through `read_jsonl`, so that a bad line is reported by file and line number
wherever it is used.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

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
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: this is not JSON ({error.msg} at column {error.colno}). "
                "Every line must be one JSON object."
            ) from None
        except RecursionError:
            raise DataError(
                f"{path}, line {number}: this JSON is nested too deeply. Every line must be one plain object."
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number}: this is a JSON {_kind(record)}, not an object. "
                "Every line must be one JSON object."
            )
        records.append((number, record))
    if not records:
        raise DataError(f"{path} holds no samples. Give a file with one JSON object per line.")
    return records


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """Write one JSON object per line, UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


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
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: the field '{field}' is a JSON {_kind(value)}, not text. Write it as a string.")
    return value


def _lines(path: Path) -> list[str]:
    try:
        raw = gzip.open(path).read() if path.name.endswith(".gz") else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"The data file {path} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a file. Name a .jsonl file inside it.") from None
    except (OSError, EOFError) as error:
        raise DataError(f"The data file {path} cannot be read ({error}).") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    return text.split("\n")  # not splitlines: JSON strings may hold U+2028 and its kin


def _kind(value: object) -> str:
    names = {list: "list", dict: "object", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
