"""What a field accepts, from text and from YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.fields import Kind, field_docs, from_text, from_yaml, one_of, read_fields, suggest
from megatron_dlm.config.sections import PARTS, SECTIONS


@dataclass(slots=True)
class Sample:
    """A section."""

    count: int = 3
    """How many,
    over two lines."""
    ways: list[Literal["a", "b"]] | None = None
    """Which ways."""
    no_noise: bool = False
    """Be quiet."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"flag": "--set"})
    """Anything else."""


@dataclass(slots=True)
class Undocumented:
    """A section."""

    count: int = 3


@dataclass(slots=True)
class Ambiguous:
    """A section."""

    either: int | str = 3
    """A number or a word."""


@dataclass(slots=True)
class Inexpressible:
    """A section."""

    pair: tuple[int, int] = (1, 2)
    """Two numbers."""


def test_a_field_becomes_a_flag():
    count, ways, no_noise, extra = read_fields("sample", Sample)
    assert (count.flag, count.off, count.help, count.default) == ("--count", None, "How many, over two lines.", 3)
    assert count.kind == Kind(int)
    assert ways.kind == Kind(str, ("a", "b"), many=True, optional=True)
    assert (no_noise.flag, no_noise.off) == ("--no-noise", "--noise")
    assert (extra.flag, extra.default, extra.kind) == ("--set", {}, Kind(dict))


@pytest.mark.parametrize("config", [*SECTIONS.values(), *PARTS.values()], ids=lambda config: config.__name__)
def test_every_field_of_every_section_has_a_docstring(config):
    docs = field_docs(config)
    assert [field.name for field in dataclasses.fields(config)] == list(docs)
    assert all(doc.endswith(".") for doc in docs.values())
    assert config.__doc__.strip()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_has_a_default_for_every_field_of_its_declared_type(section):
    config = SECTIONS[section]()
    for field in read_fields(section, SECTIONS[section]):
        assert from_yaml(field.kind, getattr(config, field.name), field.name) == field.default


def test_faulty_sections_are_our_mistake():
    with pytest.raises(ValueError, match="Undocumented.count has no docstring"):
        read_fields("sample", Undocumented)
    with pytest.raises(TypeError, match=r"int \| str is neither one type"):
        read_fields("sample", Ambiguous)
    with pytest.raises(TypeError, match=r"tuple\[int, int\] cannot be given as a flag"):
        read_fields("sample", Inexpressible)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Kind(int), "12", 12),
        (Kind(float), "1e-4", 1e-4),
        (Kind(float), "3", 3.0),
        (Kind(str), "3", "3"),
        (Kind(str, ("a", "b")), "b", "b"),
        (Kind(int, many=True), ["1", "2"], [1, 2]),
        (Kind(str, ("a", "b"), many=True, optional=True), ["b", "a"], ["b", "a"]),
    ],
)
def test_text_and_yaml_give_the_same_value(kind, text, value):
    parsed = from_text(kind, text, "--x")
    assert parsed == value and type(parsed) is type(value)
    again = from_yaml(kind, value, "s.x in f")
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (Kind(int), "2.5", "--x needs a whole number, not '2.5'"),
        (Kind(int, optional=True), "None", "--x needs a whole number"),
        (Kind(float), "fast", "--x needs a number, not 'fast'"),
        (Kind(float), "nan", "--x needs a finite number"),
        (Kind(float), "inf", "--x needs a finite number"),
        (
            Kind(str, ("static", "dynamic")),
            "dinamic",
            "--x needs static or dynamic, not 'dinamic'. Did you mean dynamic?",
        ),
        (Kind(int, many=True), ["1", "two"], "--x needs a whole number, not 'two'"),
    ],
)
def test_text_of_the_wrong_type_is_refused(kind, text, words):
    with pytest.raises(ConfigError) as caught:
        from_text(kind, text, "--x")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Kind(int), True, "needs a whole number, not True"),
        (Kind(int), 2.0, "needs a whole number, not 2.0"),
        (Kind(int), None, "needs a whole number, not null"),
        (Kind(float), "1,5", "needs a number, not '1,5'"),
        (Kind(float), True, "needs a number, not True"),
        (Kind(float), float("inf"), "needs a finite number"),
        (Kind(bool), "false", "needs true or false, not 'false'"),
        (Kind(bool), 1, "needs true or false, not 1"),
        (Kind(str), 7, "needs text, not 7. Put it in quotes."),
        (Kind(str, ("a", "b")), "c", "needs a or b, not 'c'"),
        (Kind(str, many=True), "a.jsonl", "needs a list, not 'a.jsonl'"),
        (Kind(str, many=True), ["a", 1], "needs text, not 1"),
        (Kind(dict), [1], "needs a mapping of names to values, not [1]"),
        (Kind(dict), {1: 2}, "needs names as its keys, not 1"),
    ],
)
def test_yaml_of_the_wrong_type_is_refused(kind, value, words):
    with pytest.raises(ConfigError) as caught:
        from_yaml(kind, value, "s.x in f")
    assert str(caught.value).startswith("s.x in f ") and words in str(caught.value)


def test_none_is_a_value_only_of_optional_fields():
    assert from_yaml(Kind(int, optional=True), None, "s.x") is None
    with pytest.raises(ConfigError):
        from_yaml(Kind(str), None, "s.x")


@pytest.mark.parametrize(("words", "text"), [([1], "1"), ([1, 2], "1 or 2"), (["a", "b", "c"], "a, b or c")])
def test_one_of(words, text):
    assert one_of(words) == text


def test_suggest_names_the_nearest_or_falls_back():
    assert suggest("nmu_layers", ["hidden_size", "num_layers"], "See --help.") == "Did you mean num_layers?"
    assert suggest("zzz", ["hidden_size", "num_layers"], "See --help.") == "See --help."
