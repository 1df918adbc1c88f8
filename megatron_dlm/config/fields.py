"""What a field of a settings dataclass accepts, where it may come from, and what its help says.

Everything is read from the dataclass: the name gives the flag, the type says what is accepted, the string literal
below the field is the help. A field is one of: int, float, bool, str, Literal of strings, a list of these, any of them
or None, or dict[str, Any].

Invariants (tests/config/test_fields.py):
  - a value from a flag (text) and the same value from YAML become equal Python values of the declared type;
  - anything else is refused with one `ConfigError` sentence that names the flag or the YAML key.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_dlm.config.errors import ConfigError

LARGEST = 2**63  # whole numbers end up in 64 bits
SHOWN = 60  # longest value that a message repeats

_NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping of names to values",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field accepts: one `item` or `many`; `choices` are the words of a Literal; `optional` allows None."""

    item: type
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Field:
    """One field of one section. `flag` is its spelling on the command line; `off` the opposite flag of a bool."""

    section: str
    name: str
    kind: Kind
    help: str
    default: Any
    flag: str
    off: str | None

    @property
    def flags(self) -> tuple[str, ...]:
        return (self.flag,) if self.off is None else (self.flag, self.off)


def flag_name(field_name: str) -> str:
    """`lr_warmup_iters` -> `--lr-warmup-iters`."""
    return "--" + field_name.replace("_", "-")


def read_fields(section: str, config: type) -> list[Field]:
    """The fields of a section's dataclass, in order.

    Raises:
        TypeError: a field has a type that flags cannot express.
        ValueError: a field has no docstring. (Both are mistakes in this package, not the user's.)
    """
    hints, docs = get_type_hints(config), field_docs(config)
    result = []
    for item in dataclasses.fields(config):
        if item.name not in docs:
            raise ValueError(f"{config.__name__}.{item.name} has no docstring below it")
        kind = _kind_of(hints[item.name])
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        flag = item.metadata.get("flag", flag_name(item.name))
        off = None
        if kind.item is bool:  # the opposite of --no-load-optim is --load-optim
            off = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else "--no-" + flag.removeprefix("--")
        result.append(Field(section, item.name, kind, docs[item.name], default, flag, off))
    return result


def field_docs(config: type) -> dict[str, str]:
    """The string literal below each field of a class and of those it extends, from their source, with white space
    folded."""
    docs = field_docs(config.__base__) if config.__base__ is not object else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body
    return docs | {
        node.target.id: " ".join(below.value.value.split())
        for node, below in zip(body, body[1:])
        if isinstance(node, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def from_text(kind: Kind, text: str | list[str], where: str) -> Any:
    """The value of a flag. `text` is a list where the kind takes many; `where` is the flag, for the error."""
    if kind.many:
        return [_item_from_text(kind, item, where) for item in text]
    return _item_from_text(kind, text, where)


def from_yaml(kind: Kind, value: Any, where: str) -> Any:
    """The value of a YAML key, checked against the kind. `where` names key and file, for the error."""
    if value is None and kind.optional:
        return None
    if kind.many:
        if not isinstance(value, list):
            raise ConfigError(f"{where} needs a list, not {_shown(value)}. Write it in brackets: [a, b].")
        return [_checked(kind, item, where) for item in value]
    return _checked(kind, value, where)


def suggest(wrong: str, known: Iterable[str], otherwise: str) -> str:
    """`Did you mean X?` with the known name nearest to `wrong`, or the `otherwise` sentence when none is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1)
    return f"Did you mean {near[0]}?" if near else otherwise


def one_of(words: Iterable[Any]) -> str:
    """`1, 2, 4 or 8`."""
    *most, last = [str(word) for word in words]
    return f"{', '.join(most)} or {last}" if most else last


def _kind_of(hint: Any) -> Kind:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"{hint} is neither one type nor one type or None")
        hint, optional = inner[0], True
    many = get_origin(hint) is list
    if many:
        (hint,) = get_args(hint)
    if get_origin(hint) is Literal and all(isinstance(word, str) for word in get_args(hint)):
        return Kind(str, get_args(hint), many, optional)
    if hint in (int, float, str) or (hint is bool and not many):
        return Kind(hint, (), many, optional)
    if get_origin(hint) is dict and not many and not optional:
        return Kind(dict)
    raise TypeError(f"{hint} cannot be given as a flag")


def _item_from_text(kind: Kind, text: str, where: str) -> Any:
    try:
        return _checked(kind, kind.item(text), where)
    except ValueError:
        raise _refused(kind, text, where) from None


def _checked(kind: Kind, value: Any, where: str) -> Any:
    if kind.item is float and type(value) is int:
        value = _real(value, where)
    if type(value) is not kind.item or (kind.choices and value not in kind.choices):
        raise _refused(kind, value, where)
    if kind.item is float and not math.isfinite(value):
        raise ConfigError(f"{where} needs a finite number, not {value}.")
    if kind.item is int and not -LARGEST <= value < LARGEST:
        raise ConfigError(f"{where} needs a whole number that 64 bits can hold, not {_shown(value)}.")
    if kind.item is str and not value.strip():  # the variable of a script that was never set
        raise ConfigError(f"{where} is empty. Give a value, or leave it out.")
    if kind.item is dict and not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} needs names as its keys, not {next(k for k in value if not isinstance(k, str))!r}.")
    return value


def _refused(kind: Kind, value: Any, where: str) -> ConfigError:
    if kind.choices:
        hint = suggest(str(value), kind.choices, "")
        return ConfigError(f"{where} needs {one_of(kind.choices)}, not {_shown(value)}. {hint}".rstrip())
    quotable = kind.item is str and not isinstance(value, (dict, list, set, bytes)) and value is not None
    return ConfigError(
        f"{where} needs {_NOUNS[kind.item]}, not {_shown(value)}.{' Put it in quotes.' if quotable else ''}"
    )


def _real(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{where} needs a finite number, not {_shown(value)}.") from None


def _shown(value: Any) -> str:
    """A value as the user wrote it, more or less, and short enough for a sentence."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        return f"one of more than {SHOWN} digits"  # Python refuses to print the longest
    text = "null" if value is None else repr(value) if isinstance(value, (str, list, dict, bool)) else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
