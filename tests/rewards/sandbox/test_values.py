"""Values through JSON."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter, OrderedDict, deque
from decimal import Decimal
from fractions import Fraction

import pytest

from megatron_dlm.rewards.sandbox.values import decode, encode

VALUES = [
    None, True, 0, -1, 1 << 53, -(1 << 200), 0.1, -0.0, math.inf, "", "é\udcff", b"\x00", bytearray(b"a"), 1 - 2j,
    [], [[1], (2, {3})], {}, {(1, 2): [None]}, frozenset({1}), range(1, 9, 2), deque([1]), Counter("aa"),
    OrderedDict([(1, 2)]), Fraction(1, 3), Decimal("1.10"), datetime.date(2020, 1, 2), datetime.timedelta(1, 2, 3),
    datetime.datetime(2020, 1, 2, 3, 4, 5, 6), {"int": "0x1"},
]  # fmt: skip


def _refuse(thing):
    raise AssertionError(thing)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_there_and_back(value):
    again = decode(json.loads(json.dumps(encode(value, _refuse))), _refuse)
    assert again == value and type(again) is type(value) and repr(again) == repr(value)


def test_nan():
    assert math.isnan(decode(encode(math.nan, _refuse), _refuse))


class _LyingList(list):
    __eq__ = lambda self, other: True
    __hash__ = None
    __iter__ = lambda self: iter([9])


class _LyingInt(int):
    __index__ = lambda self: 9
    __eq__ = lambda self, other: True
    __hash__ = None


def test_content_travels_and_behaviour_does_not():
    assert decode(encode(_LyingList([1]), _refuse), _refuse) == [1]
    assert type(decode(encode(_LyingInt(1), _refuse), _refuse)) is int
    assert decode(encode(_LyingInt(1), _refuse), _refuse) == 1


def test_what_is_no_value_stays():
    thing = object()
    assert encode([thing], lambda x: 7 if x is thing else 0) == {"list": [{"object": 7}]}
    assert decode({"tuple": [{"object": 7}]}, lambda number: -number) == (-7,)


@pytest.mark.parametrize(
    "data",
    [
        [], 1.5, {}, {"list": 1}, {"eval": "1"}, {"int": "x"}, {"dict": [[1]]}, {"dict": [[{"list": []}, 1]]},
        {"object": "1"}, {"object": True}, {"range": [1]}, {"float": "os"}, {"list": [], "set": []}, {"bytes": 5},
    ],
)  # fmt: skip
def test_nonsense_is_refused(data):
    with pytest.raises((ValueError, TypeError)):
        decode(data, _refuse)
