"""Generated tasks from the reasoning_gym package, as a source of prompts.

`reasoning_gym:NAME?size=500&seed=1&min_terms=3` names a generator and its options. The task keeps the generator's name,
options and entry, with which rewards/reasoning_gym.py asks the generator itself whether an answer is right. The package
is imported only when such a source is used.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qsl

from megatron_dlm.config.errors import DataError, DependencyError

NAME = "reasoning_gym"
PREFIX = NAME + ":"
DEFAULT_SEED = 0  # without one the package would draw its own, and the run would not repeat


@dataclass(frozen=True, slots=True)
class Task:
    """A generated task.

    `metadata` has dataset (name), options (its configuration) and entry (as generated), all plain data.
    """

    question: str
    answer: str
    metadata: dict


def parse_source(source: str) -> tuple[str, dict[str, Any]]:
    """Split 'reasoning_gym:NAME?a=1&b=x' into the name and its options.

    Values are read as JSON where they are JSON, else as text.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    return name, {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}


def generate(source: str) -> list[Task]:
    """All tasks of one source.

    Raises:
        DependencyError: the reasoning_gym package is absent.
        DataError: it has no generator of this name, or the options do not fit it.
    """
    name, options = parse_source(source)
    options.setdefault("seed", DEFAULT_SEED)
    dataset = create(name, options)
    tasks = []
    for entry in dataset:
        # the entry crosses into the reward workers and may be written to disk: plain data only
        answer = entry["answer"] if isinstance(entry["answer"], str) else str(entry["answer"])
        tasks.append(Task(entry["question"], answer, {"dataset": name, "options": options, "entry": entry}))
    return tasks


def create(name: str, options: dict[str, Any]):
    """The generator itself; same errors as `generate`."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise DependencyError(
            "The prompt source 'reasoning_gym:' needs the reasoning-gym package, which is not installed. "
            "Run: pip install reasoning-gym"
        ) from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4) or sorted(DATASETS)[:5]
        raise DataError(f"reasoning_gym has no dataset {name!r}. Use one of its names, such as {', '.join(near)}.")
    known = {entry.name for entry in fields(DATASETS[name][1])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise DataError(
            f"The reasoning_gym dataset {name!r} has no option {', '.join(unknown)}. Use {', '.join(sorted(known))}."
        )
    for option in ("size", "seed"):
        if option in options and type(options[option]) is not int:
            raise DataError(f"The option {option} of reasoning_gym:{name} is {options[option]!r}. Give a whole number.")
    try:
        return create_dataset(name, **options)
    except (AssertionError, ValueError, TypeError) as error:
        raise DataError(
            f"The reasoning_gym dataset {name!r} refuses the options {options}: {error}. Correct them."
        ) from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
