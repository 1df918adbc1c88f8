"""Plain values as JSON, so that two processes can exchange them without trusting each other.

What is sent is content, never behaviour: an object whose class overrides == arrives as what it holds, or not at all.
Values: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, and from the standard
library deque, Counter, OrderedDict, defaultdict, Fraction, Decimal, date, datetime, timedelta. Instances of a class
derived from one of these arrive as the base. Anything else stays where it is, and a number for it is sent: the caller
says how (`stay`), and what such a number means on the other side (`find`).

Invariants (tests/rewards/sandbox/test_values.py): decode(encode(x)) equals x and has its type; no text makes `decode`
build anything but these types.
"""

from __future__ import annotations

import datetime
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_MAPPINGS = {
    "Counter": Counter, "OrderedDict": OrderedDict, "defaultdict": lambda items: defaultdict(None, items), "dict": dict,
}  # fmt: skip
_SCALARS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda x: [x.real.hex(), x.imag.hex()], lambda v: complex(*map(float.fromhex, v))),
    "range": (range, lambda x: [hex(x.start), hex(x.stop), hex(x.step)], lambda v: range(*(int(n, 16) for n in v))),
    "Fraction": (
        Fraction, lambda x: [hex(x.numerator), hex(x.denominator)], lambda v: Fraction(*(int(n, 16) for n in v)),
    ),
    "Decimal": (Decimal, lambda x: Decimal.__str__(x), Decimal),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "timedelta": (datetime.timedelta, lambda x: [x.days, x.seconds, x.microseconds], lambda v: datetime.timedelta(*v)),
}  # fmt: skip
_MAPPING_TYPES = (("Counter", Counter), ("OrderedDict", OrderedDict), ("defaultdict", defaultdict), ("dict", dict))
_SEQUENCE_TYPES = tuple(_SEQUENCES.items())
_SMALL = 1 << 53


def encode(value: Any, stay: Callable[[Any], int]) -> Any:
    """What json.dumps can write.

    Args:
        value: anything.
        stay: keeps an object that is no value, and returns the number under which the other side can speak of it.

    Raises:
        RecursionError: nested too deeply, or within itself.
    """
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    if kind is str:
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_SMALL < number < _SMALL else {"int": hex(number)}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, str):
        return str.__str__(value)
    for name, base in _MAPPING_TYPES:
        if isinstance(value, base):
            return {name: [[encode(k, stay), encode(v, stay)] for k, v in dict.items(value)]}
    for name, base in _SEQUENCE_TYPES:
        if isinstance(value, base):
            return {name: [encode(item, stay) for item in base.__iter__(value)]}
    for name, (base, write, _) in _SCALARS.items():
        if isinstance(value, base):
            return {name: write(value)}
    return {"object": stay(value)}


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """The value again.

    Args:
        data: what json.loads made of the other side's text; it may be anything.
        find: from a number to what stands for the object here.

    Raises:
        ValueError, TypeError, KeyError, OverflowError, ArithmeticError, RecursionError: this is no encoded value.
    """
    if data is None or type(data) in (bool, int, str):
        return data
    if type(data) is not dict or len(data) != 1:
        raise ValueError("not a value")
    ((name, held),) = data.items()
    if name == "int":
        return int(held, 16)
    if name == "float":
        return float.fromhex(held)
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(item, find) for item in held)
    if name in _MAPPINGS:
        return _MAPPINGS[name]({decode(key, find): decode(item, find) for key, item in held})
    if name in _SCALARS:
        return _SCALARS[name][2](held)
    if name == "object" and type(held) is int:
        return find(held)
    raise ValueError("not a value")
