"""What benchmarks/gpu_suite.py makes of its result: a table with a line for every figure, measured or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_figures import COMMAND, PARTS, Figure, Part
from benchmarks.rl_report import markdown

MARKER = "gpu suite"
HEADER = ("figure", "value", "aim", "")


def markdown_of(result: Mapping[str, Any]) -> str:
    """The table of each part, below what was measured where, when and how.

    Args:
        result: {"about": ..., "parts": name -> {"figures": key -> {"value", "note"} or {"why"}, "why", "seconds"}}.
    """
    return "\n\n".join([_heading(result), *(_part(part, result["parts"].get(part.name)) for part in PARTS.values())])


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


def _heading(result: Mapping[str, Any]) -> str:
    about = result["about"]
    if not any("value" in one for part in result["parts"].values() for one in part["figures"].values()):
        return (
            f"Nothing of this has been measured yet. `{COMMAND} --json gpu.json --write docs/performance.md` does it."
        )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    toys = (
        ""
        if about["size"] != "tiny"
        else "**Toy sizes: these figures show that the program works, and nothing else.** "
    )
    driver = f", driver {about['driver']}" if about["driver"] else ""
    return (
        f"{toys}{about['device']}{driver}; Python {about['python']}, {versions}; {about['date']}; revision "
        f"{about['revision'] or 'unknown'}; `{about['command']}`."
    )


def _part(part: Part, record: Mapping[str, Any] | None) -> str:
    lines = [HEADER]
    command = f"`{COMMAND} --parts {part.name}`"
    figures = {} if record is None else record["figures"]
    for figure in part.figures:
        found = figures.get(figure.key, {})
        aim = "" if figure.least is None else f"{figure.least:g} {figure.unit} or more".replace(" x ", " ")
        if "value" in found:
            lines.append((figure.text, _value(figure, found["value"]), aim, _cell(found.get("note", ""))))
            continue
        why = found.get("why") or (record or {}).get("why") or command
        lines.append((figure.text, "not measured", aim, _cell(why)))
    return f"**{part.text}**\n\n{markdown(lines)}"


def _value(figure: Figure, value: float) -> str:
    if figure.unit == "" and value == int(value):
        return f"{value:.0f}"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{number} {figure.unit}".strip()


def _aim(figure: Figure, found: Mapping[str, Any]) -> str:
    if figure.least is None:
        return ""
    reached = "reached" if found["value"] >= figure.least else "missed"
    return f" (aim: {figure.least:g} or more, {reached})"


def _cell(text: str) -> str:
    """What a Markdown table can hold."""
    return text.replace("|", "/").replace("\n", " ")
