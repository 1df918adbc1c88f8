"""A file of JSON lines that takes long to make, and is gone on with after a kill.

    output = Unfinished.begin("out.jsonl", identity)     # refuses what it cannot go on with
    for part in parts(lines[output.lines :]):
        output.add(records of the part, totals)
    output.finish()                                      # out.jsonl is there now

While it grows it is OUT.unfinished, and OUT.unfinished.json says how far it is good: so many lines, so many bytes, and
what it is made of. A part is on the disk before that file speaks of it, and what a kill left behind it is cut off. So
the file that comes out is, byte by byte, that of a run which nobody disturbed, if parts begin at the same lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config.errors import ConfigError, DataError

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is made of, in plain JSON values.

    Attributes:
        contents: what it is -> its hash ("the lines of --input": "3f...").
        flags: flag -> its value.
    """

    contents: Mapping[str, str]
    flags: Mapping[str, Any]

    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """The first thing that an unfinished file has been begun with and that is another now, in words."""
        for what, found in self.contents.items():
            if stored["contents"].get(what) != found:
                return f"other contents of {what}"
        for flag, now in self.flags.items():
            then = stored["flags"].get(flag)
            if then != now:
                return f"{flag} {_shown(then)}, and this run has {_shown(now)}"
        return None


class Unfinished:
    """The file at work. One process writes it.

    Attributes:
        lines: records that are safe.
        totals: what was last given to `add`; empty at the beginning.
    """

    def __init__(self, path: str, target: Path, identity: Identity) -> None:
        self.path, self.target, self.identity = path, target, identity
        self.partial = target.with_name(target.name + ".unfinished")
        self.note = target.with_name(target.name + ".unfinished.json")
        self.lines, self.bytes, self.totals = 0, 0, {}
        self.file: Any = None

    @classmethod
    def begin(cls, path: str, identity: Identity) -> Unfinished:
        """Start a file, or go on with it.

        Raises:
            ConfigError: it is complete, or was begun with something else, or another process writes it, or it cannot
                be written. DataError: what is there is damaged.
        """
        refuse_complete(path)
        output = cls(path, Path(os.path.realpath(path)), identity)
        try:
            output._open()
        except OSError as error:
            raise output._cannot_write(error) from None
        return output

    def add(self, records: Iterable[dict], totals: Mapping[str, float]) -> None:
        """The next records; afterwards they are safe.

        Args:
            totals: kept for the run that goes on.

        Raises:
            ConfigError: they cannot be written.
        """
        written = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records]
        try:
            self.file.write(b"".join(written))
            self._flush()
            self._write_note(self.lines + len(written), self.bytes + sum(map(len, written)), dict(totals))
        except OSError as error:
            raise self._cannot_write(error) from None

    def finish(self) -> None:
        """Everything is written: the file takes its place.

        Raises:
            ConfigError: it cannot.
        """
        try:
            self._flush()
            os.replace(self.partial, self.target)
            self.note.unlink()
        except OSError as error:
            raise self._cannot_write(error) from None
        self.close()

    def close(self) -> None:
        """Leave the file as it is. It may be called more than once."""
        self.file.close()

    def _open(self) -> None:
        self.file = open(self.partial, "ab")
        try:
            self._lock()
            length = self.file.tell()
            stored = self._read_note() if length else None  # a note alone is what a run left as it ended
            if stored is not None:
                self._check(stored, length)
                self.lines, self.bytes, self.totals = stored["lines"], stored["bytes"], stored["totals"]
                self.file.truncate(self.bytes)
            else:
                self._write_note(0, 0, {})
        except BaseException:
            self.file.close()
            raise

    def _check(self, stored: dict, length: int) -> None:
        difference = self.identity.difference(stored)
        if difference is not None:
            raise ConfigError(
                f"--output {self.path} was begun with {difference}. Start with the same to go on, or delete "
                f"{self.partial.name} and {self.note.name} beside it."
            )
        if length < stored["bytes"]:
            raise DataError(
                f"{self.partial} has {length} bytes, and {self.note.name} says {stored['bytes']}. Delete both to "
                "start anew."
            )

    def _lock(self) -> None:
        """Held as long as the file is open. Not every file system of several hosts has locks."""
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"--output {self.path} is being written by another process. Give another name, or end that process."
                ) from None

    def _flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read_note(self) -> dict:
        try:
            stored = json.loads(self.note.read_text(encoding="utf-8"))
            if stored["version"] != _VERSION:
                raise ValueError
            kinds = {"lines": int, "bytes": int, "totals": dict, "contents": dict, "flags": dict}
            if not all(type(stored[name]) is kind for name, kind in kinds.items()):
                raise ValueError
            return stored
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{self.note} does not say how far {self.partial.name} is good. Delete both to start anew, or give "
                "another --output."
            ) from None

    def _write_note(self, lines: int, size: int, totals: dict[str, float]) -> None:
        identity = {"contents": dict(self.identity.contents), "flags": dict(self.identity.flags)}
        note = {"version": _VERSION, "lines": lines, "bytes": size, "totals": totals, **identity}
        fresh = self.note.with_name(self.note.name + ".new")
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump(note, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.note)
        self.lines, self.bytes, self.totals = lines, size, totals

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"--output {self.path} cannot be written to ({error.strerror}). Give a place with room where this user may "
            f"write; the {self.lines} lines that are done stay."
        )


def refuse_complete(path: str) -> None:
    """Refuse an output that is there.

    Raises:
        ConfigError: it is.
    """
    if os.path.exists(path):
        raise ConfigError(
            f"--output {path} is there already, complete or of another program. Delete it, or give another name."
        )


def _shown(value: Any) -> str:
    text = "off" if value is None or value is False else "on" if value is True else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
