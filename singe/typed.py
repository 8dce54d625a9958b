"""Dataclasses as plain data for JSON, and back: data that is read is checked against their annotations."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Any

Reader = Callable[[Any, str], Any]
"""Converts data that ``json`` has read; also takes its place in the file, for messages."""


def as_data(value: Any) -> Any:
    """A dataclass, or a field's value, as ``json`` writes it; numbers that JSON does not have become None."""
    if is_dataclass(value):
        return {field.name: as_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reader(kind: Any) -> Reader:
    """A reader of values of a kind from plain data; it raises ValueError and says where data is of another kind.

    Annotations, which are code, are looked up here; reading runs none.

    Args:
        kind: a dataclass, or an annotation that its fields may have here: str, bool, int (not below
            0), float (NaN where the data has None), ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]`` and
            unions of these, of which the first that fits is taken.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _one_of([reader(k) for k in inner if k is not types.NoneType], types.NoneType in inner)
    if origin is dict:
        return _mapping(reader(inner[1]))
    if origin is tuple:
        return _sequence(reader(inner[0])) if inner[-1] is Ellipsis else _entries([reader(k) for k in inner])
    return {float: _float, int: _count}.get(kind, partial(_of, kind))


def _dataclass(kind: type) -> Reader:
    annotations = typing.get_type_hints(kind)
    readers = {field.name: reader(annotations[field.name]) for field in fields(kind)}
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def read(value: Any, at: str) -> Any:
        data = _of(dict, value, at)
        if missing := [name for name in needed if name not in data]:
            raise ValueError(f"expected {missing[0]} at {at or 'the top'}, got nothing of that name")
        if unknown := sorted(set(data) - set(readers)):
            raise ValueError(f"expected no {reprlib.repr(unknown[0])} at {at or 'the top'}")
        return kind(**{name: readers[name](item, f"{at}.{name}".lstrip(".")) for name, item in data.items()})

    return read


def _one_of(readers: Sequence[Reader], optional: bool) -> Reader:
    def read(value: Any, at: str) -> Any:
        if value is None and optional:
            return None
        errors = []
        for own in readers:
            try:
                return own(value, at)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError("; or ".join(errors))

    return read


def _mapping(own: Reader) -> Reader:
    return lambda value, at: {
        key: own(item, f"{at}[{reprlib.repr(key)}]") for key, item in _of(dict, value, at).items()
    }


def _sequence(own: Reader) -> Reader:
    return lambda value, at: tuple([own(item, f"{at}[{i}]") for i, item in enumerate(_of(list, value, at))])


def _entries(readers: Sequence[Reader]) -> Reader:
    def read(value: Any, at: str) -> Any:
        items = _of(list, value, at)
        if len(items) != len(readers):
            raise ValueError(f"expected {len(readers)} entries at {at}, got {len(items)}")
        return tuple([own(item, f"{at}[{i}]") for i, (own, item) in enumerate(zip(readers, items, strict=True))])

    return read


def _of(kind: type, value: Any, at: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__} at {at or 'the top'}, got {reprlib.repr(value)}")
    return value


def _count(value: Any, at: str) -> int:
    number: int = _of(int, value, at)
    if not 0 <= number < 2**63:
        raise ValueError(f"expected a non-negative int at {at}, got {reprlib.repr(number)}")
    return number


def _float(value: Any, at: str) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError(f"expected a number at {at}, got {reprlib.repr(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"expected a number at {at}, got one of {value.bit_length()} bits") from error
