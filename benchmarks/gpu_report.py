"""What benchmarks/gpu_suite.py makes of its result: a table with a line for every figure, measured or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_figures import COMMAND, PARTS, Figure, Part
from benchmarks.rl_report import markdown

MARKER = "gpu suite"
HEADER = ("figure", "value", "aim", "")
NOTHING = f"Nothing of this has been measured yet. `{COMMAND} --json gpu.json --write docs/performance.md` does it."


def markdown_of(result: Mapping[str, Any]) -> str:
    """The table of each part, below where, when and how it was measured: parts may come from different runs.

    Args:
        result: {"parts": name -> record}, a record being {"figures": key -> {"value", "note"} or {"why"}, "why",
            "seconds", "about": of the run that made it}.
    """
    records = [result["parts"].get(part.name, {"figures": {}}) for part in PARTS.values()]
    tables = [_part(part, record) for part, record in zip(PARTS.values(), records)]
    return "\n\n".join(tables if any(map(_measured, records)) else [NOTHING, *tables])


def summary(result: Mapping[str, Any]) -> str:
    """A line per figure that was measured, for the screen, and how many were not."""
    lines, missing = [], 0
    for part in PARTS.values():
        record = result["parts"].get(part.name, {"figures": {}})
        for figure in part.figures:
            found = record["figures"].get(figure.key, {})
            if "value" in found:
                lines.append(f"{part.name}: {figure.text}: {_value(figure, found['value'])}{_aim(figure, found)}")
            else:
                missing += 1
    return "\n".join([*lines, f"{len(lines)} figures; {missing} not measured."])


def _measured(record: Mapping[str, Any]) -> bool:
    """Whether a part has a figure."""
    return any("value" in one for one in record["figures"].values())


def _origin(about: Mapping[str, Any]) -> str:
    """Where, when and how a part was measured."""
    toys = "**Toy sizes: these figures show that the program works, and nothing else.** "
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    driver = f", driver {about['driver']}" if about["driver"] else ""
    return (
        f"{toys if about['size'] == 'tiny' else ''}{about['device']}{driver}; Python {about['python']}, {versions}; "
        f"{about['date']}; size {about['size']}; revision {about['revision'] or 'unknown'}; `{about['command']}`."
    )


def _part(part: Part, record: Mapping[str, Any]) -> str:
    lines = [HEADER]
    command = f"`{COMMAND} --parts {part.name}`"
    for figure in part.figures:
        found = record["figures"].get(figure.key, {})
        if "value" in found:
            lines.append((figure.text, _value(figure, found["value"]), figure.aim, _cell(found.get("note", ""))))
            continue
        why = found.get("why") or record.get("why") or command
        lines.append((figure.text, "not measured", figure.aim, _cell(why)))
    origin = [_origin(record["about"])] if _measured(record) else []
    return "\n\n".join([f"**{part.text}**", *origin, markdown(lines)])


def _value(figure: Figure, value: float) -> str:
    if figure.unit == "" and value == int(value):
        return f"{value:.0f}"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{number} {figure.unit}".strip()


def _aim(figure: Figure, found: Mapping[str, Any]) -> str:
    if not figure.aim:
        return ""
    return f" (aim: {figure.aim}, {'reached' if figure.reached(found['value']) else 'missed'})"


def _cell(text: str) -> str:
    """What a Markdown table can hold."""
    return text.replace("|", "/").replace("\n", " ")
