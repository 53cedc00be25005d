"""JSON that others wrote, as values of our types: one that does not fit says where, and no code behind meets it."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from oftfx.errors import AdapterFileError

T = TypeVar("T")
_LARGEST = 2**63
"""Beyond it no count or size of ours is, and Python's own arithmetic with floats fails."""


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or is nested deeper than Python goes.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterFileError: there is no such file, or it is none.
    """
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterFileError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path} is not a JSON object, but {type(found).__name__}")
    return found


def is_text(value: object) -> bool:
    """Whether a value is text that can be written; JSON can also say halves of characters, which cannot."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def made(kind: type[T], value: Any, where: str = "") -> T:
    """A value of a type, of what `json.loads` gave.

    Args:
        kind: ``str``, ``int``, ``float``, ``bool``, None, a ``Literal``, a union, ``tuple[X, ...]``, ``Mapping[str,
            X]``, or a dataclass, whose fields are looked at; one with ``from_dict`` makes itself.
        value: the value.
        where: it stands, for the message.

    Raises:
        ValueError: it is of another type; the message names the field.
    """
    return _made(kind, value, where)


def _made(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        fitting = type(None) if value is None else next(k for k in inner if k is not type(None))
        return _made(fitting, value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in inner:
            raise ValueError(f"{where} is {_shown(value)}, expected one of {', '.join(map(repr, inner))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {_shown(value)}, expected a list")
        return tuple(_made(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_shown(value)}, expected an object")
        return {_made(str, k, where): _made(inner[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, where)
    return _plain(kind, value, where)


def _object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, expected an object")
    if hasattr(kind, "from_dict"):
        return kind.from_dict(value)
    known = _fields(kind)
    if (unknown := next((n for n in value if n not in known), None)) is not None:
        raise ValueError(f"{where} has {unknown!r}, which is no field of it")
    fields = {n: _made(known[n], v, f"{where}.{n}".lstrip(".")) for n, v in value.items()}
    needed = (f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING)
    if (missing := next((n for n in needed if n not in fields), None)) is not None:
        raise ValueError(f"{where or 'it'} has no {missing!r}")
    return kind(**fields)


@cache
def _fields(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]


def _plain(kind: Any, value: Any, where: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and not (isinstance(value, int) and abs(value) >= _LARGEST):
        return value
    if kind is int and is_number and isinstance(value, int) and abs(value) < _LARGEST:
        return value
    if kind is str and is_text(value):
        return value
    if kind in (bool, type(None)) and isinstance(value, kind):
        return value
    raise ValueError(f"{where} is {_shown(value)}, expected {_WORDS.get(kind, kind.__name__)}")


_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
