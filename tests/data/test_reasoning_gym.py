"""Generated tasks: sources, options, and the sentences for what does not fit."""

from __future__ import annotations

import sys

import pytest

from megatron_dlm.config.errors import DataError, DependencyError
from megatron_dlm.data.reasoning_gym import generate, parse_source


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("reasoning_gym:chain_sum", ("chain_sum", {})),
        ("reasoning_gym:x?size=5&seed=1", ("x", {"size": 5, "seed": 1})),
        ("reasoning_gym:x?a=true&b=word&c=[1,2]&d=0.5", ("x", {"a": True, "b": "word", "c": [1, 2], "d": 0.5})),
    ],
)
def test_sources(source, expected):
    assert parse_source(source) == expected


def test_tasks_repeat():
    pytest.importorskip("reasoning_gym")
    tasks = generate("reasoning_gym:chain_sum?size=5&seed=1&min_terms=3&max_terms=3")
    assert len(tasks) == 5 and tasks == generate("reasoning_gym:chain_sum?size=5&seed=1&min_terms=3&max_terms=3")
    assert generate("reasoning_gym:chain_sum?size=5") == generate("reasoning_gym:chain_sum?size=5")
    assert all(len(task.metadata["entry"]["metadata"]["expression"].split()) == 5 for task in tasks)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("reasoning_gym:chain_sums", "Use one of its names, such as chain_sum"),
        ("reasoning_gym:chain_sum?terms=3", "no option terms.*min_terms"),
        ("reasoning_gym:chain_sum?min_terms=9&max_terms=2", "refuses the options"),
    ],
)
def test_sentences(source, words):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match=words):
        generate(source)


def test_the_package_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(DependencyError, match="pip install reasoning-gym"):
        generate("reasoning_gym:chain_sum")
