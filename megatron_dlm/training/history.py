"""The metrics of a run, read back as one history, whatever interrupted it.

A metrics file is appended to over restarts. After a crash the run goes on from its last checkpoint, so some steps stand
twice; and the line that was being written may be cut. What was recorded later counts: a line takes the place of all
earlier ones of its own and of higher steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path


def read_history(path: str | Path) -> list[dict]:
    """The records of a metrics file in order of their steps, each step once. Lines that hold no record are skipped.

    Raises:
        OSError: the file cannot be read.
    """
    records: list[dict] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def series(records: Sequence[dict], name: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was recorded as a finite number. `scale` multiplies the values."""
    found = [(record["step"], record[name]) for record in records if _finite(record.get(name))]
    return [step for step, _ in found], [scale * value for _, value in found]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
