"""Calling functions of another process that lies.

A test wants `f(3) == 9`. The side that holds the test (`Peer`) never runs code of the side that holds `f`
(`serve`), and never shows it a test or an expected value: it sends arguments and gets back plain values, which it
compares itself. What is no plain value stays over there and is known here by a number (`Remote`); such an object is
called, iterated and asked for attributes over there, but it equals nothing that was made here, whatever its class says.

Messages are JSON texts behind their length. While one side waits for an answer it may be asked to call back one of the
functions that it has sent.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from megatron_dlm.rewards.sandbox.values import decode, encode

_MUTABLE = (list, dict, set, bytearray, deque)
_OPERATIONS = {
    "len": len, "iter": iter, "str": str, "repr": repr, "bool": bool, "contains": operator.contains,
    "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem,
    "eq": lambda x, y: x == y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y, "enter": lambda x: x.__enter__(),
}  # fmt: skip
_READY_MADE = ("int", "float", "str", "list", "dict", "set", "tuple", "bool", "bytes", "complex", "frozenset", "object",
               "len", "max", "min", "sum", "abs", "sorted")  # fmt: skip


class Gone(BaseException):
    """The other side has ended, or speaks nonsense. No `except Exception` of a test hides it."""


class Channel:
    """Messages over a stream socket that is already there."""

    def __init__(self, descriptor: int, largest: int):
        self._descriptor, self._largest = descriptor, largest

    def send(self, message: dict) -> None:
        data = json.dumps(message).encode()
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            raise Gone from None

    def receive(self) -> dict:
        length = int.from_bytes(self._read(4), "big")
        if length > self._largest:
            raise Gone
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise Gone from None
        if type(message) is not dict:
            raise Gone
        return message

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = os.read(self._descriptor, min(length, 1 << 16))
            except OSError:
                raise Gone from None
            if not part:
                raise Gone
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


class Peer:
    """The side that holds the test."""

    def __init__(self, channel: Channel):
        self._channel = channel
        self._given: list[Callable] = []  # functions of ours that the other side may call back
        self.gone = False

    def get(self, name: str) -> Any:
        """A global of the other side's program: a value, or a `Remote`. Raises NameError."""
        return self.ask({"get": name})

    def call(self, number: int, arguments: tuple, named: dict) -> Any:
        message = {
            "call": number,
            "arguments": [self._encode(argument) for argument in arguments],
            "named": {name: self._encode(argument) for name, argument in named.items()},
        }
        return self.ask(message, {**dict(enumerate(arguments)), **named})

    def operate(self, name: str, number: int, *others: Any) -> Any:
        return self.ask({"do": name, "on": number, "arguments": [self._encode(other) for other in others]})

    def ask(self, message: dict, arguments: dict[int | str, Any] | None = None) -> Any:
        """Send a request, serve calls back until its answer comes, and return or raise what it says.

        Args:
            arguments: of a call, by place or name: those that it has changed over there are changed here.
        """
        try:
            self._channel.send(message)
            while "back" in (answer := self._channel.receive()):
                self._channel.send(self._call_back(answer))
            if "raise" in answer:
                name, text = answer["raise"]
                error = _exception(name)(str(text)[:1000])
            else:
                for place, changed in answer.get("changed", ()):
                    _refill((arguments or {})[place], self._decode(changed))
                return self._decode(answer["value"])
        except Gone:
            self.gone = True
            raise
        except Exception:  # nothing that the other side can send has such a form
            self.gone = True
            raise Gone from None
        raise error

    def _call_back(self, asked: dict) -> dict:
        function = self._given[asked["back"]]
        arguments = [self._decode(argument) for argument in asked["arguments"]]
        try:
            return {"value": self._encode(function(*arguments))}
        except Exception as error:
            return {"raise": [type(error).__name__, str(error)]}

    def _encode(self, value: Any) -> Any:
        return encode(value, self._stay)

    def _decode(self, data: Any) -> Any:
        return decode(data, self._find)

    def _stay(self, thing: Any) -> int:
        if type(thing) is Remote:
            return object.__getattribute__(thing, "_number")
        name = getattr(thing, "__name__", None)
        if name in _READY_MADE and getattr(builtins, name) is thing:
            return -1 - _READY_MADE.index(name)
        if not callable(thing):
            raise TypeError(f"a {type(thing).__name__} cannot be handed to a program under test")
        self._given.append(thing)
        return -1 - len(_READY_MADE) - (len(self._given) - 1)

    def _find(self, number: int) -> Any:
        if number >= 0:
            return Remote(self, number)
        index = -1 - number
        if index < len(_READY_MADE):
            return getattr(builtins, _READY_MADE[index])
        return self._given[index - len(_READY_MADE)]


class Remote:
    """An object of the other process, by its number."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.call(self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask({"attribute": self._number, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask({"attribute": self._number, "name": name, "set": self._peer._encode(value)})

    def __len__(self) -> int:
        return self._peer.operate("len", self._number)

    def __bool__(self) -> bool:
        return self._peer.operate("bool", self._number) is True

    def __contains__(self, item: Any) -> bool:
        return self._peer.operate("contains", self._number, item) is True

    def __getitem__(self, key: Any) -> Any:
        return self._peer.operate("getitem", self._number, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.operate("setitem", self._number, key, value)

    def __delitem__(self, key: Any) -> None:
        self._peer.operate("delitem", self._number, key)

    def __iter__(self) -> Any:
        remote = self._peer.operate("iter", self._number)
        while True:
            more, item = self._peer.ask({"next": remote._number})
            if not more:
                return
            yield item

    def __next__(self) -> Any:
        more, item = self._peer.ask({"next": self._number})
        if not more:
            raise StopIteration
        return item

    def __eq__(self, other: object) -> bool:
        if type(other) is not Remote:
            return False  # whatever its class says
        return self._number == other._number or self._peer.operate("eq", self._number, other) is True

    def __hash__(self) -> int:
        return hash(self._number)

    def __lt__(self, other: object) -> bool:
        return self._peer.operate("lt", self._number, other) is True if type(other) is Remote else NotImplemented

    def __le__(self, other: object) -> bool:
        return self._peer.operate("le", self._number, other) is True if type(other) is Remote else NotImplemented

    def __str__(self) -> str:
        return str(self._peer.operate("str", self._number))

    def __repr__(self) -> str:
        return str(self._peer.operate("repr", self._number))


def serve(channel: Channel, names: dict[str, Any]) -> None:
    """The side that holds the program: answer until the other side has had enough.

    Args:
        names: the program's globals.

    Raises:
        Gone: the other side has ended.
        SystemExit, KeyboardInterrupt, MemoryError: the program's; not answered.
    """
    kept: list[Any] = []

    def stay(thing: Any) -> int:
        kept.append(thing)
        return len(kept) - 1

    def find(number: int) -> Any:
        if number >= 0:
            return kept[number]
        index = -1 - number
        if index < len(_READY_MADE):
            return getattr(builtins, _READY_MADE[index])
        return lambda *arguments: back(index - len(_READY_MADE), arguments)

    def back(index: int, arguments: tuple) -> Any:
        channel.send({"back": index, "arguments": [encode(argument, stay) for argument in arguments]})
        answer = channel.receive()
        if "raise" in answer:
            raise _exception(answer["raise"][0])(answer["raise"][1])
        return decode(answer["value"], find)

    while True:
        asked = channel.receive()
        try:
            answer = _answer(asked, names, stay, find)
        except (Gone, SystemExit, KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:
            answer = {"raise": _name_of(error)}
        channel.send(answer)


def _answer(asked: dict, names: dict, stay: Callable[[Any], int], find: Callable[[int], Any]) -> dict:
    if "get" in asked:
        if asked["get"] not in names:
            raise NameError(f"name {asked['get']!r} is not defined")
        return {"value": encode(names[asked["get"]], stay)}
    if "next" in asked:
        end = object()
        item = next(find(asked["next"]), end)
        return {"value": encode((item is not end, None if item is end else item), stay)}
    if "attribute" in asked:
        thing = find(asked["attribute"])
        if "set" in asked:
            setattr(thing, asked["name"], decode(asked["set"], find))
            return {"value": None}
        return {"value": encode(getattr(thing, asked["name"]), stay)}
    arguments = [decode(argument, find) for argument in asked["arguments"]]
    if "do" in asked:
        return {"value": encode(_OPERATIONS[asked["do"]](find(asked["on"]), *arguments), stay)}
    named = {name: decode(argument, find) for name, argument in asked["named"].items()}
    value = find(asked["call"])(*arguments, **named)
    places = [(*enumerate(arguments), *named.items()), (*asked["arguments"], *asked["named"].values())]
    changed = [
        [place, data]
        for (place, argument), sent in zip(*places)
        if isinstance(argument, _MUTABLE) and (data := encode(argument, stay)) != sent
    ]
    return {"value": encode(value, stay), "changed": changed}


def _name_of(error: BaseException) -> list[str]:
    """The nearest built-in exception and its text.

    The end of an iteration is not passed on: it would silently end a loop of the test's.
    """
    for kind in type(error).__mro__:
        if kind.__module__ == "builtins" and not issubclass(kind, StopIteration | StopAsyncIteration):
            return [kind.__name__, str(error)]
    return ["RuntimeError", str(error)]


def _exception(name: Any) -> type[Exception]:
    kind = getattr(builtins, name, None) if type(name) is str else None
    usable = isinstance(kind, type) and issubclass(kind, Exception)
    if not usable or issubclass(kind, StopIteration | StopAsyncIteration | UnicodeError | BaseExceptionGroup):
        return RuntimeError
    return kind


def _refill(mine: Any, now: Any) -> None:
    """Make an argument what the other side has made of its copy."""
    if type(mine) is not type(now):
        return
    if isinstance(mine, list | bytearray):
        mine[:] = now
    elif isinstance(mine, deque):
        mine.clear()
        mine.extend(now)
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(now)
